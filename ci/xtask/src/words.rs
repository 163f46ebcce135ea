// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The rules for prose that a program can check: openings of sentences that hide their subject, the
//! width of comments and documents, and the length of tests' names. `CONTRIBUTING.md` has all
//! rules.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result};
use walkdir::WalkDir;

/// Openings of sentences that have no noun as their subject.
const OPENINGS: [&str; 5] = ["Who ", "Whoever ", "Nobody ", "What is ", "What was "];

/// Most columns of a comment or of a line in a document, with its indentation.
const COLUMNS: usize = 100;

/// Most words of a test's name.
const WORDS: usize = 7;

/// Folders with a dot before their names that are part of the tree.
const FOLDERS: [&str; 3] = [".cargo", ".ci", ".config"];

/// The places of prose in a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    /// In its comments, after `//`.
    Code,
    /// In the lines that begin with `#`.
    Script,
    /// Everywhere but in blocks of code.
    Document,
}

impl Kind {
    /// Returns the kind of a file, by its name or, for a script, its first bytes. `None` if the
    /// file has no prose.
    fn of(path: &Path) -> Result<Option<Self>> {
        let extension = path.extension().and_then(|extension| extension.to_str());
        Ok(match extension.unwrap_or_default() {
            "rs" | "c" | "h" => Some(Self::Code),
            "sh" | "toml" | "service" | "socket" | "timer" | "conf" | "rules" | "sysusers" => {
                Some(Self::Script)
            }
            "md" => Some(Self::Document),
            _ if path.ends_with("Kbuild") || path.ends_with("Makefile") => Some(Self::Script),
            _ => begins_as_script(path)?.then_some(Self::Script),
        })
    }
}

/// Returns whether a file's first line names the program that runs it.
fn begins_as_script(path: &Path) -> Result<bool> {
    let mut first = Vec::new();
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file.take(2).read_to_end(&mut first)?;
    Ok(first == b"#!")
}

/// Returns the text of an item of a list, if a line of prose begins one: with `*`, `-`, or a number
/// and a full stop.
fn item(prose: &str) -> Option<&str> {
    let (mark, text) = prose.split_once(' ')?;
    let number = mark.strip_suffix('.').unwrap_or_default();
    let is_number = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
    (mark == "*" || mark == "-" || is_number).then_some(text)
}

/// Finds the faults of all source files and documents below a folder: for each a line with file,
/// line number and fault.
pub fn faults(root: &Path) -> Result<Vec<String>> {
    let entries = WalkDir::new(root).sort_by_file_name().into_iter();
    let entries = entries.filter_entry(|entry| {
        let name = entry.file_name().to_string_lossy();
        let is_hidden = name.starts_with('.') && !FOLDERS.contains(&&*name);
        entry.depth() == 0 || !(is_hidden || name == "target")
    });
    let mut faults = Vec::new();
    for entry in entries {
        let entry = entry?;
        let path = entry.path();
        if !entry.file_type().is_file() {
            continue;
        }
        let Some(kind) = Kind::of(path)? else {
            continue;
        };
        let text = fs::read_to_string(path)
            .with_context(|| format!("{} cannot be read", path.display()))?;
        let name = path.strip_prefix(root)?.display();
        let found = faults_of(&text, kind).into_iter();
        faults.extend(found.map(|(line, fault)| format!("{name}:{line}: {fault}")));
    }
    Ok(faults)
}

/// Finds the faults of a text. Returns the line number, from 1, and the description of each.
fn faults_of(text: &str, kind: Kind) -> Vec<(usize, String)> {
    let mut faults = Vec::new();
    // Whether a sentence begins with the next word of prose.
    let mut begins = true;
    let mut in_code = false;
    let mut is_test = false;
    for (line, number) in text.lines().zip(1..) {
        if let Some(name) = function(line).filter(|_| is_test) {
            is_test = false;
            if name.split('_').count() > WORDS {
                let fault = format!("the name of a test has more than {WORDS} words");
                faults.push((number, fault));
            }
        }
        is_test |= kind == Kind::Code && line.trim() == "#[test]";
        let prose = match kind {
            Kind::Code => comment(line),
            Kind::Script => script_comment(line),
            Kind::Document => Some(line.trim_start()),
        };
        let is_fence = prose.is_some_and(|prose| prose.starts_with("```"));
        in_code ^= is_fence;
        let is_prose = |prose: &&str| !(prose.is_empty() || in_code || is_fence);
        let Some(prose) = prose.filter(is_prose) else {
            begins = true;
            continue;
        };
        // A row of a table cannot be broken.
        if !prose.starts_with('|') && width(line) > COLUMNS {
            faults.push((number, format!("the text is wider than {COLUMNS} columns")));
        }
        let item = item(prose);
        begins |= item.is_some();
        let sentences = item.unwrap_or(prose).split_inclusive(['.', '!', '?', ':']);
        for sentence in sentences {
            let words = sentence.trim_start();
            let opening = OPENINGS.iter().find(|opening| words.starts_with(**opening));
            if let Some(opening) = opening.filter(|_| begins) {
                let opening = opening.trim_end();
                faults.push((
                    number,
                    format!("a sentence opens with `{opening}`: name its subject"),
                ));
            }
            begins = words.ends_with(['.', '!', '?', ':']);
        }
    }
    faults
}

/// Returns the columns of a line, without the targets of its links, which cannot be broken.
fn width(line: &str) -> usize {
    let mut parts = line.split("](");
    let first = parts.next().unwrap_or_default().chars().count();
    let rest = parts.map(|part| {
        let text = part.split_once(')').map_or("", |(_, text)| text);
        "]()".len() + text.chars().count()
    });
    let is_target = line.contains("]: http");
    if is_target {
        0
    } else {
        first + rest.sum::<usize>()
    }
}

/// Returns the text of a comment in a script or a configuration, if the line is one.
fn script_comment(line: &str) -> Option<&str> {
    let text = line.trim_start().strip_prefix('#')?;
    // The first line names the program that runs the script.
    (!text.starts_with('!')).then(|| text.trim_start_matches('#').trim_start())
}

/// Returns the name of the function that a line begins.
fn function(line: &str) -> Option<&str> {
    let name = line.trim_start().strip_prefix("fn ")?;
    name.split_once('(').map(|(name, _)| name)
}

/// Returns the text of a line's comment, if the line is or ends with one.
fn comment(line: &str) -> Option<&str> {
    let (before, text) = line.split_once("//")?;
    // A URL or a string is no comment.
    let is_comment = before.is_empty() || before.ends_with(char::is_whitespace);
    let text = text.trim_start_matches(['/', '!']);
    is_comment.then(|| text.trim_start())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str, kind: Kind) -> Vec<usize> {
        faults_of(text, kind)
            .into_iter()
            .map(|(line, _)| line)
            .collect()
    }

    #[test]
    fn finds_sentences_without_a_noun() {
        let text = concat!(
            "/// Who",
            " asks is told.\n",
            "let a = 1; // What",
            " is lost is gone.\n",
            "// A reader is admitted. Nobody",
            " else is.\n",
            "// A peer, and\n// Who",
            " is no sentence's opening here.\n",
            "let text = \"// Whoever",
            "\";\n",
        );
        assert_eq!(lines(text, Kind::Code), [1, 2, 3]);
        let text = concat!(
            "Text.\n\n* Whoever",
            " comes\n```\nNobody",
            " knows\n```\nNobody",
            " did\n"
        );
        assert_eq!(lines(text, Kind::Document), [3, 7]);
    }

    #[test]
    fn finds_wide_comments() {
        let wide = format!(
            "    // {}\n    let x = \"{}\";\n",
            "x".repeat(94),
            "x".repeat(94)
        );
        assert_eq!(lines(&wide, Kind::Code), [1]);
        assert_eq!(
            lines(&wide.replace("xx\n", "x\n"), Kind::Code),
            Vec::<usize>::new()
        );
    }

    #[test]
    fn finds_long_names_of_tests() {
        let test = "    #[test]\n    // A reason.\n    fn a_b_c_d_e_f_g() {\n    }\n";
        let text = format!("{test}    fn one_two_three_four_five_six_seven_eight() {{}}\n");
        assert_eq!(lines(&text, Kind::Code), Vec::<usize>::new());
        let text = text.replace("_g()", "_g_h()");
        assert_eq!(lines(&text, Kind::Code), [3]);
    }

    #[test]
    fn finds_wide_text_of_documents_and_scripts() {
        let wide = "word ".repeat(21);
        let text = format!("{wide}\n| {wide} |\n```\n{wide}\n```\n* {wide}\n");
        assert_eq!(lines(&text, Kind::Document), [1, 6]);
        let link = format!("See [a page]({}), and more.\n", "x".repeat(100));
        assert_eq!(lines(&link, Kind::Document), Vec::<usize>::new());
        let text = format!("#!/bin/sh {wide}\n# {wide}\nrun {wide}\n    # {wide}\n");
        assert_eq!(lines(&text, Kind::Script), [2, 4]);
    }

    #[test]
    fn finds_items_of_lists_without_a_noun() {
        let text = concat!(
            "* a word\n* Who",
            " asks\n- Nobody",
            " has it\n10. What",
            " is it\n"
        );
        assert_eq!(lines(text, Kind::Document), [2, 3, 4]);
        let text = concat!("A - Who", " asks\n1 Nobody", " has it\n");
        assert_eq!(lines(text, Kind::Document), Vec::<usize>::new());
    }

    #[test]
    fn reads_scripts_and_configurations() {
        let folder = tempfile::tempdir().unwrap();
        let script = folder.path().join("run");
        fs::write(&script, "#!/bin/sh\n").unwrap();
        let data = folder.path().join("data");
        fs::write(&data, "# data").unwrap();
        let kind = |path: &Path| Kind::of(path).unwrap();
        assert_eq!((kind(&script), kind(&data)), (Some(Kind::Script), None));
        assert_eq!(kind(Path::new("barlink@.service")), Some(Kind::Script));
    }
}
