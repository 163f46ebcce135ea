// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests that everything exists that the documents refer to: the tests behind the rules of the
//! protocol and of the threat model, and the targets of links.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use barlink_driver_checks::TOPICS;
use barlink_sandbox::builds::repository;
use walkdir::WalkDir;

/// Lists the files of the tree with this extension.
fn files(extension: &str) -> Vec<PathBuf> {
    let built_or_hidden =
        |name: &str| name == "target" || (name.len() > 1 && name.starts_with('.'));
    let walk = WalkDir::new(repository())
        .into_iter()
        .filter_entry(|entry| {
            entry.depth() == 0 || !entry.file_name().to_str().is_some_and(built_or_hidden)
        });
    walk.filter_map(Result::ok)
        .map(walkdir::DirEntry::into_path)
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect()
}

/// Returns the names of all tests in the tree: functions with the test attribute, the driver's
/// checks, the scenes with the bare guest, and the tests that executors of QEMU's share.
fn tests() -> Result<HashSet<String>> {
    let checks = TOPICS.iter().flat_map(|(_, checks)| *checks);
    let mut names: HashSet<_> = checks.map(|(name, _)| (*name).to_owned()).collect();
    for path in files("rs") {
        let source = fs::read_to_string(&path)?;
        let marked = source.split("#[test]").skip(1);
        names.extend(marked.filter_map(|rest| {
            let (_, declaration) = rest.split_once("fn ")?;
            Some(declaration.split_once('(')?.0.to_owned())
        }));
        let listed = ["scene!(", " test!("].map(|list| source.split(list).skip(1));
        names.extend(listed.into_iter().flatten().filter_map(|rest| {
            let (test, _) = rest.split_once(')')?;
            let path = test.split_whitespace().last()?;
            Some(path.rsplit("::").next()?.to_owned())
        }));
    }
    Ok(names)
}

/// The heading in front of the table of rules and their tests.
const TABLE: &str = "\n## 11. Tests of the rules\n";

/// Returns the numbers of the rules of a document.
fn rules(text: &str) -> Vec<&str> {
    let rules = text.split("\n* **").skip(1);
    rules.filter_map(|rule| rule.split("**").next()).collect()
}

/// Returns the rows of the table of rules: number, and the names of tests.
fn rows(table: &str) -> Vec<(&str, Vec<&str>)> {
    let rows = table.lines().filter_map(|line| {
        let (number, tests) = line.strip_prefix("| ")?.split_once(" | ")?;
        let is_number = number.starts_with(|c: char| c.is_ascii_digit());
        is_number.then(|| (number, tests.split('`').skip(1).step_by(2).collect()))
    });
    rows.collect()
}

#[test]
fn every_protocol_rule_has_tests() -> Result<()> {
    let document = fs::read_to_string(repository().join("docs/protocol.md"))?;
    let known = tests()?;
    let (text, table) = document.split_once(TABLE).context("no table of tests")?;
    let (rules, rows) = (rules(text), rows(table));
    assert!(rules.len() > 40, "only {} rules are found", rules.len());
    let mut missing = Vec::new();
    for rule in &rules {
        match rows.iter().filter(|(number, _)| number == rule).count() {
            1 => (),
            rows => missing.push(format!("{rule}: {rows} rows in section 11")),
        }
        if rules.iter().filter(|other| *other == rule).count() > 1 {
            missing.push(format!("{rule}: several rules of this number"));
        }
    }
    for (number, tests) in &rows {
        if !rules.contains(number) {
            missing.push(format!("{number}: a row in section 11, and no rule"));
        }
        if tests.is_empty() {
            missing.push(format!("{number}: names no test"));
        }
        let unknown = tests.iter().filter(|name| !known.contains(**name));
        missing.extend(unknown.map(|name| format!("{number}: no test {name}")));
    }
    assert!(missing.is_empty(), "{missing:#?}");
    Ok(())
}

#[test]
fn threat_model_names_existing_tests() -> Result<()> {
    let document = fs::read_to_string(repository().join("docs/threat-model.md"))?;
    let known = tests()?;
    let named = document.split('`').skip(1).step_by(2);
    let is_a_test = |name: &&str| {
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        name.matches('_').count() >= 2 && name.chars().all(legal)
    };
    let named: Vec<_> = named.filter(is_a_test).collect();
    assert!(named.len() > 20, "only {} tests are named", named.len());
    let missing: Vec<_> = named
        .into_iter()
        .filter(|name| !known.contains(*name))
        .collect();
    assert!(missing.is_empty(), "{missing:#?}");
    Ok(())
}

/// Returns whether a document has a heading with this name, in the form of a link's anchor.
fn has_heading(path: &Path, name: &str) -> Result<bool> {
    let document = fs::read_to_string(path)?;
    let mut headings = document.lines().filter(|line| line.starts_with('#'));
    Ok(headings.any(|line| {
        let words = line.trim_start_matches('#').trim().to_lowercase();
        let kept = |c: char| c.is_alphanumeric() || c == ' ' || c == '-' || c == '_';
        let written: String = words.chars().filter(|c| kept(*c)).collect();
        written.replace(' ', "-") == name
    }))
}

#[test]
fn links_between_files_lead_somewhere() -> Result<()> {
    let mut links = 0;
    for path in files("md") {
        let folder = path.parent().unwrap_or(Path::new("/"));
        let document = fs::read_to_string(&path)?;
        for link in document.split("](").skip(1) {
            let link = link.split(')').next().context("a link has no end")?;
            if link.contains("://") {
                continue;
            }
            links += 1;
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => folder.join(file),
            };
            ensure!(
                target.exists() && (heading.is_empty() || has_heading(&target, heading)?),
                "{} links to {link}, which is not there",
                path.display()
            );
        }
    }
    assert!(links > 5, "only {links} links are found");
    Ok(())
}
