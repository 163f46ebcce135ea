// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests of the library for C, by programs in C and C++ beside a broker.

#[path = "../../../client/tests/library/broker.rs"]
#[expect(dead_code, reason = "another test uses the rest")]
mod broker;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

use barlink::Kind;
use barlink_bindings::BindingsArgs;

use self::broker::{Running, TIMEOUT};

/// Compilers, and their options for C11 and C++17.
const COMPILERS: [&[&str]; 4] = [
    &["gcc", "-std=gnu11"],
    &["g++", "-std=gnu++17", "-xc++"],
    &["clang", "-std=gnu11"],
    &["clang++", "-std=gnu++17", "-xc++"],
];
const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-g"];

/// Returns the folder of the library.
fn library() -> &'static Path {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    LIBRARY.get_or_init(|| {
        let prefix = Path::new(env!("CARGO_TARGET_TMPDIR")).join("library");
        let args = BindingsArgs {
            prefix: Some(prefix.clone()),
            check: false,
        };
        barlink_bindings::run(&args).unwrap();
        prefix
    })
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// Compiles a program as a user does, by `pkg-config`.
fn compile(compiler: &[&str], source: &Path, program: &Path) {
    let mut find = Command::new("pkg-config");
    find.args(["--cflags", "--libs", "barlink"])
        .env("PKG_CONFIG_PATH", library().join("lib/pkgconfig"));
    let found = String::from_utf8(run(&mut find).stdout).unwrap();
    let mut command = Command::new(compiler[0]);
    command.args(&compiler[1..]).args(WARNINGS).arg(source);
    // The language of the source is not that of the library.
    let options = ["-xnone", "-o"];
    command
        .args(options)
        .arg(program)
        .args(found.split_whitespace());
    run(&mut command);
}

fn run(command: &mut Command) -> Output {
    let output = command
        .env("LD_LIBRARY_PATH", library().join("lib"))
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    output
}

fn exists(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdout(Stdio::null());
    command.status().is_ok()
}

#[test]
fn every_call_refuses_bad_input() {
    let broker = Running::start(&["loop=host-host,64K", "drop=host-host,4K,drop"]);
    let program = broker.folder.path().join("check");
    for compiler in COMPILERS.iter().filter(|compiler| exists(compiler[0])) {
        compile(compiler, &source("tests/check.c"), &program);
        let app = broker.attach();
        app.reset("loop").unwrap();
        app.reset("drop").unwrap();
        drop(app);
        run(Command::new(&program).arg(broker.control()));
    }
}

/// The library's memory is that of `malloc`, which the sanitizer replaces.
#[test]
fn bad_input_reaches_no_memory() {
    let broker = Running::start(&["loop=host-host,64K", "drop=host-host,4K,drop"]);
    let program = broker.folder.path().join("check");
    let sanitized = ["gcc", "-std=gnu11", "-fsanitize=address,undefined"];
    compile(&sanitized, &source("tests/check.c"), &program);
    let mut check = Command::new(&program);
    check.env("UBSAN_OPTIONS", "halt_on_error=1");
    run(check.arg(broker.control()));
    broker.attach().reset("loop").unwrap();
    broker.attach().reset("drop").unwrap();
    if !exists("valgrind") {
        println!("there is no valgrind: going on without it");
        return;
    }
    let version = run(Command::new("valgrind").arg("--version")).stdout;
    let version = String::from_utf8(version).unwrap();
    let minor = version.trim_start_matches("valgrind-3.").split('.').next();
    if minor.and_then(|minor| minor.parse().ok()) < Some(22) {
        println!(
            "{} lacks epoll_pwait2(2): going on without it",
            version.trim()
        );
        return;
    }
    compile(COMPILERS[0], &source("tests/check.c"), &program);
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9", "--leak-check=full"]);
    run(valgrind.arg(&program).arg(broker.control()));
}

#[test]
fn examples_exchange_records() {
    let broker = Running::start(&["loop=host-host,64K"]);
    let [send, receive] = ["send", "receive"].map(|name| {
        let program = broker.folder.path().join(name);
        compile(
            COMPILERS[0],
            &source(&format!("examples/{name}.c")),
            &program,
        );
        program
    });
    let words = |program: &Path| {
        let mut command = Command::new(program);
        command.arg(broker.control()).arg("loop");
        command.env("LD_LIBRARY_PATH", library().join("lib"));
        command
    };
    let mut sender = words(&send);
    let mut sender = sender.stdin(Stdio::piped()).spawn().unwrap();
    let text = b"one\ntwo\nthree\n";
    sender.stdin.take().unwrap().write_all(text).unwrap();
    assert!(sender.wait().unwrap().success());
    assert_eq!(run(words(&receive).arg("3")).stdout, text);
}

/// The example at the top of the header.
#[test]
fn example_of_header_compiles() {
    let header = fs::read_to_string(source("include/barlink.h")).unwrap();
    let code = header
        .lines()
        .filter_map(|line| line.strip_prefix("//     "));
    let code: String = code.map(|line| format!("{line}\n")).collect();
    assert!(code.contains("int main(void)"), "{code}");
    let broker = Running::start(&["up=host-host,4K"]);
    let path = broker.folder.path().join("example.c");
    let code = code.replace("\"default\"", &format!("{:?}", broker.control()));
    fs::write(&path, code).unwrap();
    let program = broker.folder.path().join("example");
    for compiler in COMPILERS.iter().filter(|compiler| exists(compiler[0])) {
        compile(compiler, &path, &program);
    }
    let mut command = Command::new(&program);
    command.env("LD_LIBRARY_PATH", library().join("lib"));
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let app = broker.attach();
    let mut sender = app.sender("up").unwrap();
    // There is room for two of these, so the first one was received.
    for _ in 0..3 {
        sender
            .send_timeout(Kind::USER, &[7; 2000], TIMEOUT)
            .unwrap();
    }
    app.force_reset("up").unwrap();
    let output = child.unwrap().wait_with_output().unwrap();
    let records = String::from_utf8(output.stdout).unwrap();
    assert!(records.starts_with("record 0: 2000 bytes\n"), "{records}");
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("was reset"), "{errors}");
}

#[test]
fn library_exports_its_functions_alone() {
    let library = library().join("lib/libbarlink.so.1");
    let mut list = Command::new("nm");
    list.args(["--dynamic", "--defined-only"]).arg(library);
    let list = String::from_utf8(run(&mut list).stdout).unwrap();
    let names: Vec<_> = list.lines().filter(|line| line.contains(" T ")).collect();
    assert!(names.len() > 25, "{list}");
    for name in list.lines().filter(|line| !line.ends_with(" A BARLINK_1")) {
        assert!(
            name.contains(" T barlink_") && name.ends_with("@@BARLINK_1"),
            "{name}"
        );
    }
}
