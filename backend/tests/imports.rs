// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The direction of imports between the parts of `protocol/src`, `client/src`, `backend/src` and
//! `guest-driver`, which docs/architecture.md shows.

use std::collections::BTreeSet;
use std::path::Path;

/// The parts of a crate, from the lowest to the highest, and the parts that each imports. A part is
/// a module or a folder. The files of a folder that are in no other part belong to the folder's
/// part.
type Parts = &'static [(&'static str, &'static [&'static str])];

/// A crate whose imports are checked.
struct Crate {
    /// The folder with its source, from that of this crate.
    source: &'static str,
    parts: Parts,
    /// Imports of a higher part, which make a circle. docs/architecture.md has the reasons.
    circles: &'static [(&'static str, &'static str)],
}

const CRATES: [Crate; 4] = [
    Crate {
        source: "../protocol/src",
        parts: PROTOCOL,
        circles: &[],
    },
    Crate {
        source: "src",
        parts: BACKEND,
        circles: &[],
    },
    Crate {
        source: "../client/src",
        parts: CLIENT,
        circles: &[],
    },
    Crate {
        source: "../guest-driver",
        parts: DRIVER,
        circles: &[
            ("device", "mapping"),
            ("device", "buffer"),
            ("mapping", "file"),
            ("chardev", "file"),
            ("irq", "pci"),
        ],
    },
];

const PROTOCOL: Parts = &[
    ("io", &[]),
    ("aligned", &["io"]),
    ("strategy", &[]),
    ("sync", &[]),
    ("wire", &[]),
    ("copy", &["sync"]),
    ("cursor", &["wire"]),
    ("streaming", &[]),
    ("region", &["io", "sync", "wire", "copy"]),
    ("cache", &["sync", "wire", "region"]),
    ("page", &["sync", "wire", "region"]),
    ("presence", &["sync", "wire", "region"]),
    ("table", &["sync", "wire", "region"]),
    ("state", &["sync", "wire", "cursor", "region"]),
    (
        "producer",
        &[
            "io",
            "sync",
            "wire",
            "cursor",
            "region",
            "state",
            "streaming",
        ],
    ),
    (
        "consumer",
        &[
            "aligned", "io", "sync", "wire", "cursor", "region", "state", "producer",
        ],
    ),
    ("tap", &["sync", "wire", "cursor", "region"]),
    ("error", &["cursor", "producer"]),
    (
        "link",
        &[
            "strategy", "sync", "region", "presence", "producer", "error",
        ],
    ),
    (
        "channel",
        &[
            "io", "strategy", "sync", "wire", "cursor", "region", "presence", "producer",
            "consumer", "error", "link",
        ],
    ),
    (
        "stream",
        &[
            "aligned", "io", "strategy", "sync", "cursor", "region", "consumer", "error", "link",
            "channel",
        ],
    ),
    ("error_kind", &["io", "wire", "error", "stream"]),
];

const BACKEND: Parts = &[
    ("environment", &[]),
    ("memory", &[]),
    ("rate_limit", &[]),
    ("token_bucket", &[]),
    ("socket", &["rate_limit"]),
    (
        "persistence",
        &[
            "environment",
            "memory",
            "rate_limit",
            "token_bucket",
            "socket",
        ],
    ),
    ("slot", &["memory", "rate_limit", "socket", "persistence"]),
    (
        "transport",
        &["memory", "rate_limit", "socket", "persistence", "slot"],
    ),
    ("broker/plan", &[]),
    ("broker/confine", &[]),
    ("broker/policy", &["socket"]),
    (
        "broker/config",
        &["transport", "broker/plan", "broker/policy"],
    ),
    ("broker/questions", &["slot"]),
    ("broker/reply", &[]),
    (
        "broker/state",
        &["persistence", "slot", "broker/plan", "broker/policy"],
    ),
    (
        "broker/accept",
        &[
            "environment",
            "rate_limit",
            "socket",
            "persistence",
            "slot",
            "transport",
            "broker/policy",
            "broker/state",
        ],
    ),
    ("broker/error", &["memory", "broker/plan", "broker/accept"]),
    (
        "broker/takeover",
        &[
            "memory",
            "rate_limit",
            "socket",
            "persistence",
            "slot",
            "broker/plan",
            "broker/policy",
            "broker/reply",
            "broker/state",
            "broker/accept",
            "broker/error",
        ],
    ),
    (
        "broker/check",
        &[
            "broker/plan",
            "broker/config",
            "broker/accept",
            "broker/error",
            "broker/takeover",
        ],
    ),
    (
        "broker/control",
        &[
            "rate_limit",
            "token_bucket",
            "socket",
            "persistence",
            "slot",
            "broker/reply",
            "broker/state",
            "broker/accept",
            "broker/takeover",
        ],
    ),
    (
        "broker",
        &[
            "socket",
            "persistence",
            "slot",
            "transport",
            "broker/plan",
            "broker/confine",
            "broker/policy",
            "broker/config",
            "broker/questions",
            "broker/state",
            "broker/accept",
            "broker/error",
            "broker/takeover",
            "broker/check",
            "broker/control",
        ],
    ),
    // The program, whose modules import the library by its name.
    ("logging", &[]),
    ("args", &[]),
    ("commands", &["args"]),
];

const CLIENT: Parts = &[
    ("notifier", &[]),
    ("claim", &[]),
    ("descriptors", &[]),
    ("error_kind", &[]),
    ("layouts", &[]),
    ("memory", &["error_kind"]),
    ("owned", &[]),
    ("peer", &["memory"]),
    ("process", &[]),
    ("event_error", &["error_kind"]),
    ("removal", &["memory", "event_error"]),
    ("timer", &["event_error", "process"]),
    ("vectors", &["event_error"]),
    ("region", &["error_kind", "memory"]),
    (
        "control",
        &["claim", "descriptors", "error_kind", "memory", "process"],
    ),
    ("guest/calls", &["memory"]),
    ("guest/buffer", &["memory", "region"]),
    ("guest/cache", &["memory", "guest/calls"]),
    ("guest/direct/sysfs/error", &["error_kind", "memory"]),
    ("guest/direct/vfio/error", &["error_kind"]),
    (
        "guest/error",
        &[
            "error_kind",
            "memory",
            "event_error",
            "guest/cache",
            "guest/direct/sysfs/error",
            "guest/direct/vfio/error",
        ],
    ),
    ("guest/find", &["guest/error"]),
    (
        "guest/node",
        &[
            "memory",
            "removal",
            "guest/calls",
            "guest/buffer",
            "guest/cache",
            "guest/error",
        ],
    ),
    (
        "guest/direct",
        &[
            "memory",
            "process",
            "removal",
            "guest/cache",
            "guest/direct/sysfs/error",
            "guest/direct/vfio/error",
            "guest/error",
        ],
    ),
    (
        "guest/interface",
        &[
            "memory",
            "event_error",
            "removal",
            "guest/calls",
            "guest/buffer",
            "guest/cache",
            "guest/direct/sysfs/error",
            "guest/error",
            "guest/find",
            "guest/node",
            "guest/direct",
        ],
    ),
    (
        "guest/broker",
        &["memory", "event_error", "guest/direct", "guest/interface"],
    ),
    (
        "guest/events",
        &[
            "memory",
            "event_error",
            "removal",
            "timer",
            "vectors",
            "guest/calls",
            "guest/direct",
            "guest/interface",
            "guest/broker",
        ],
    ),
    ("host/claim", &["control"]),
    (
        "host/events",
        &["notifier", "event_error", "vectors", "host/claim"],
    ),
    (
        "doorbell",
        &[
            "process",
            "event_error",
            "removal",
            "timer",
            "guest/events",
            "host/events",
        ],
    ),
    (
        "error",
        &[
            "claim",
            "error_kind",
            "memory",
            "event_error",
            "region",
            "control",
            "guest/error",
        ],
    ),
    ("readiness", &["event_error", "doorbell", "timer"]),
    (
        "sender",
        &["memory", "owned", "peer", "doorbell", "error", "readiness"],
    ),
    (
        "receiver",
        &["memory", "owned", "peer", "doorbell", "error", "readiness"],
    ),
    ("stream", &["error", "sender", "receiver"]),
    (
        "options",
        &[
            "error_kind",
            "removal",
            "region",
            "doorbell",
            "error",
            "sender",
            "receiver",
        ],
    ),
    (
        "tap",
        &[
            "memory",
            "process",
            "removal",
            "event_error",
            "error",
            "timer",
            "receiver",
            "options",
        ],
    ),
    (
        "guest",
        &[
            "claim",
            "memory",
            "event_error",
            "removal",
            "region",
            "guest/buffer",
            "guest/cache",
            "guest/error",
            "guest/node",
            "guest/direct",
            "guest/interface",
            "guest/broker",
            "guest/events",
            "layouts",
            "doorbell",
            "error",
            "sender",
            "receiver",
            "options",
            "tap",
        ],
    ),
    (
        "host",
        &[
            "memory",
            "removal",
            "region",
            "control",
            "host/claim",
            "host/events",
            "layouts",
            "doorbell",
            "error",
            "sender",
            "receiver",
            "options",
            "tap",
        ],
    ),
];

// `wire` is in `protocol/src`, and imports nothing of the driver.
const DRIVER: Parts = &[
    ("compat", &[]),
    ("shim", &[]),
    ("areas", &[]),
    ("claims", &[]),
    ("coherent", &["shim"]),
    ("iomem", &["shim"]),
    ("lock", &["shim"]),
    ("registration", &["shim"]),
    ("virtqueue", &["shim"]),
    ("wait", &["shim"]),
    ("memory", &["iomem"]),
    ("events", &["wait"]),
    ("doorbells", &["lock", "virtqueue"]),
    ("interrupts", &["lock", "virtqueue", "wait"]),
    ("hardware", &["iomem", "memory", "doorbells"]),
    (
        "device",
        &[
            "areas",
            "claims",
            "registration",
            "wait",
            "memory",
            "hardware",
            "mapping",
            "buffer",
        ],
    ),
    ("signals", &["shim", "wait", "device"]),
    (
        "mapping",
        &["shim", "areas", "registration", "device", "file"],
    ),
    (
        "buffer",
        &["compat", "shim", "coherent", "device", "mapping"],
    ),
    ("chardev", &["shim", "device", "file"]),
    (
        "file",
        &[
            "compat", "shim", "areas", "claims", "events", "device", "signals", "mapping",
            "buffer", "chardev",
        ],
    ),
    (
        "binding",
        &["shim", "wait", "memory", "hardware", "device", "chardev"],
    ),
    ("irq", &["compat", "wait", "pci"]),
    ("pci", &["compat", "memory", "hardware", "binding", "irq"]),
    (
        "virtio",
        &[
            "shim",
            "virtqueue",
            "memory",
            "doorbells",
            "interrupts",
            "hardware",
            "binding",
        ],
    ),
];

/// Finds the part of a module.
fn part_of(parts: Parts, module: &[String]) -> Option<&'static str> {
    let path = module.join("/");
    let is_in = |part: &str| path == part || path.starts_with(&format!("{part}/"));
    let parts = parts.iter().map(|(part, _)| *part);
    parts
        .filter(|part| is_in(part))
        .max_by_key(|part| part.len())
}

/// Collects the modules of a folder: each one's path and its source.
fn collect(folder: &Path, module: &[String], found: &mut Vec<(Vec<String>, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            collect(&path, &[module, &[name]].concat(), found);
            continue;
        }
        if path.extension().is_none_or(|extension| extension != "rs") {
            continue;
        }
        let own = match name.as_str() {
            "lib" | "main" | "barlink_main" => continue,
            "mod" => module.to_vec(),
            _ => [module, &[name]].concat(),
        };
        found.push((own, std::fs::read_to_string(path).unwrap()));
    }
}

/// Returns the code of a module, without comments and unit tests.
fn code(source: &str) -> String {
    let (code, _) = source
        .split_once("#[cfg(test)]\nmod tests")
        .unwrap_or((source, ""));
    let lines = code.lines().map(str::trim);
    let lines = lines.filter(|line| !line.starts_with("//"));
    // The kernel's format has an empty comment behind the last item of a list.
    let lines = lines.map(|line| line.trim_end_matches(" //"));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Expands the braces of an import: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn expand(import: &str) -> Vec<String> {
    let Some((start, rest)) = import.split_once('{') else {
        return vec![import.trim().to_owned()];
    };
    let (inner, _) = rest.rsplit_once('}').unwrap();
    let (mut depth, mut items) = (0, vec![String::new()]);
    for character in inner.chars() {
        match character {
            ',' if depth == 0 => items.push(String::new()),
            _ => {
                depth += i32::from(character == '{') - i32::from(character == '}');
                items.last_mut().unwrap().push(character);
            }
        }
    }
    let items = items.iter().map(|item| item.trim());
    let items = items.filter(|item| !item.is_empty());
    items
        .flat_map(|item| expand(&format!("{}{item}", start.trim())))
        .collect()
}

/// Resolves a path to the module or item of this crate that it names. Returns `None` for other
/// crates.
fn resolve(path: &str, module: &[String]) -> Option<Vec<String>> {
    let mut segments = path.split("::").map(str::trim).peekable();
    let mut resolved = match segments.next()? {
        "crate" => Vec::new(),
        "self" => module.to_vec(),
        "super" => module[..module.len() - 1].to_vec(),
        _ => return None,
    };
    while segments.next_if_eq(&"super").is_some() {
        resolved.pop();
    }
    let names = segments.map(|segment| {
        let name = segment.split(|c: char| !c.is_alphanumeric() && c != '_');
        name.clone().next().unwrap_or_default().to_owned()
    });
    resolved.extend(names.filter(|name| !name.is_empty()));
    Some(resolved)
}

/// Lists the paths that a module's code uses: imports, and paths within the code.
fn paths(code: &str) -> Vec<String> {
    let mut paths = Vec::new();
    for (start, _) in code.match_indices("use ") {
        let line = code[..start].rsplit('\n').next().unwrap_or_default();
        let is_import = line.is_empty() || (line.starts_with("pub") && line.ends_with([' ', ')']));
        if is_import && let Some((import, _)) = code[start + 4..].split_once(';') {
            paths.extend(expand(import));
        }
    }
    for (start, _) in code.match_indices("crate::") {
        let path = &code[start..];
        let end = path.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
        paths.push(path[..end.unwrap_or(path.len())].to_owned());
    }
    paths
}

#[test]
fn imports_point_one_way() {
    for Crate { source, parts, .. } in CRATES {
        let mut modules = Vec::new();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(source);
        collect(&folder, &[], &mut modules);
        let (mut wrong, mut used) = (Vec::new(), BTreeSet::new());
        for (module, code_and_comments) in &modules {
            let part = part_of(parts, module);
            let part = part.unwrap_or_else(|| panic!("{module:?} is in no part"));
            let (_, allowed) = parts.iter().find(|(name, _)| *name == part).unwrap();
            for path in paths(&code(code_and_comments)) {
                let imported = resolve(&path, module);
                let imported = imported.and_then(|resolved| part_of(parts, &resolved));
                let Some(imported) = imported.filter(|imported| *imported != part) else {
                    continue;
                };
                used.insert((part, imported));
                if !allowed.contains(&imported) {
                    wrong.push(format!("{} imports {path}", module.join("/")));
                }
            }
        }
        for (part, allowed) in parts {
            let unused = allowed
                .iter()
                .filter(|import| !used.contains(&(*part, **import)));
            wrong.extend(unused.map(|import| format!("{part} does not import {import}")));
        }
        assert!(wrong.is_empty(), "{source}:\n{}", wrong.join("\n"));
    }
}

#[test]
fn parts_import_lower_parts_only() {
    for Crate { parts, circles, .. } in CRATES {
        for (index, (part, allowed)) in parts.iter().enumerate() {
            for import in *allowed {
                let is_lower = parts[..index].iter().any(|(lower, _)| lower == import);
                let is_circle = circles.contains(&(part, import));
                assert!(is_lower != is_circle, "{part} may import {import}");
            }
        }
    }
}

#[test]
fn architecture_shows_parts() {
    let document = include_str!("../../docs/architecture.md");
    for (part, allowed) in CRATES.iter().flat_map(|one| one.parts) {
        let names: Vec<_> = allowed.iter().map(|name| format!("`{name}`")).collect();
        let row = format!("| `{part}` | {} |", names.join(", "));
        let row = row.replace("|  |", "| |");
        assert!(
            document.contains(&row),
            "docs/architecture.md has no row:\n{row}"
        );
    }
}

#[test]
fn paths_are_found_and_resolved() {
    let code = "pub use self::a::{B, c::{D, E}};\nfn f() { crate::g::h(); }\n";
    let found = [
        "self::a::B",
        "self::a::c::D",
        "self::a::c::E",
        "crate::g::h",
    ];
    assert_eq!(paths(code), found);
    let module = ["a", "b", "c"].map(str::to_owned);
    for (path, expected) in [
        ("crate::g::h", Some("g/h")),
        ("self::d", Some("a/b/c/d")),
        ("super::d as e", Some("a/b/d")),
        ("super::super::d", Some("a/d")),
        ("std::io", None),
    ] {
        let resolved = resolve(path, &module).map(|path| path.join("/"));
        assert_eq!(resolved.as_deref(), expected, "{path}");
    }
}
