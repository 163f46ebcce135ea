//! `.ci/run` with a cargo that does nothing: what it goes on without, and what it counts as failed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use anyhow::{Context, Result};
use xtask::builds::repository;

/// How the script ends where `cargo xtask setup` for 7.2 ends so: whether it succeeds, what it counts, and what cargo was
/// asked for.
fn run(setup_of_7_2: u8) -> Result<(bool, String, Vec<String>)> {
    let folder = tempfile::tempdir()?;
    let script = folder.path().join(".ci/run");
    fs::create_dir(folder.path().join(".ci"))?;
    fs::copy(repository().join(".ci/run"), &script)?;
    let asked = folder.path().join("asked");
    let cargo = folder.path().join("cargo");
    fs::write(
        &cargo,
        format!(
            "#!/bin/sh\necho \"$*\" >>{}\ncase $* in\n*'setup --kernel 7.2') exit {setup_of_7_2} ;;\n\
             *check | *test*) echo '2 passed, 0 failed' ;;\nesac\n",
            asked.display()
        ),
    )?;
    fs::set_permissions(&cargo, fs::Permissions::from_mode(0o755))?;
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH")?);
    let output = Command::new(&script).env("PATH", path).output()?;
    let printed = String::from_utf8(output.stdout)?;
    let count = printed.lines().last().context("it printed nothing")?;
    let asked = fs::read_to_string(asked)?;
    Ok((
        output.status.success(),
        count.to_owned(),
        asked.lines().map(str::to_owned).collect(),
    ))
}

#[test]
fn kernel_is_done_without_only_where_the_mirror_lacks_it() -> Result<()> {
    let of_7_2 = "xtask test --kernel 7.2 ::driver".to_owned();
    // Two tasks that count two, and three demos, which count one each.
    let (succeeds, count, asked) = run(3)?;
    assert_eq!((succeeds, &count[..]), (true, "7 passed, 0 failed"));
    assert!(!asked.contains(&of_7_2), "{asked:?}");
    let (succeeds, count, asked) = run(0)?;
    assert_eq!((succeeds, &count[..]), (true, "9 passed, 0 failed"));
    assert!(asked.contains(&of_7_2), "{asked:?}");
    for code in [1, 101] {
        let (succeeds, count, asked) = run(code)?;
        assert_eq!((succeeds, &count[..]), (false, "7 passed, 1 failed"));
        assert!(!asked.contains(&of_7_2), "{asked:?}");
    }
    Ok(())
}
