// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Tests that the messages are those of section 7 of the protocol's document. Programs in other
//! languages are written from that section.

use std::collections::BTreeSet;
use std::fmt::Debug;

use barlink_protocol::wire::layout::{self, Layout};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::message::{
    Answer, Ask, Entry, InvalidRequest, MAX_COPY, MAX_PACKET, Refusal, Reply, Request, VERSION,
};

type Names = BTreeSet<String>;

fn section() -> &'static str {
    let document = include_str!("../../../docs/protocol.md");
    let (_, rest) = document.split_once("\n## 7. ").unwrap();
    rest.split_once("\n## ").unwrap().0
}

/// Returns the rows of the table whose first column has this heading, each as its cells.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let start = format!("| {heading} |");
    let lines = section()
        .lines()
        .skip_while(|line| !line.starts_with(&start));
    let rows = lines.skip(2).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.split('|').skip(1).map(str::trim).collect())
        .collect()
}

/// Returns the texts between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Returns the name of a message.
fn name(message: &Value) -> String {
    let called = message.as_object().and_then(|fields| fields.keys().next());
    let called = called.map(String::as_str).or(message.as_str());
    called.unwrap().to_owned()
}

/// Returns the names that a kind of message has, as its parser lists them in its error for another
/// name.
fn known<T: DeserializeOwned + Debug>() -> Names {
    let error = serde_json::from_str::<T>(r#""another""#).unwrap_err();
    let names: Names = quoted(&error.to_string()).skip(1).map(Into::into).collect();
    assert!(names.len() > 5, "{error}");
    names
}

/// Parses a message, and checks that it has exactly the fields of the text. Returns the message and
/// its JSON.
fn parse<T: Serialize + DeserializeOwned>(text: &str) -> (T, Value) {
    let written: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    let message: T = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert_eq!(serde_json::to_value(&message).unwrap(), written);
    (message, written)
}

/// Collects the paths of a value's fields.
fn fields(value: &Value, path: &str, found: &mut Names) {
    match value {
        Value::Object(inner) => {
            for (key, value) in inner {
                let path = match path {
                    "" => key.clone(),
                    path => format!("{path}.{key}"),
                };
                fields(value, &path, found);
                // An array has no row of its own. An object has one, because it can be null.
                if !value.is_array() {
                    found.insert(path);
                }
            }
        }
        Value::Array(inner) => {
            let path = format!("{path}[]");
            inner.iter().for_each(|value| fields(value, &path, found));
        }
        _ => (),
    }
}

#[test]
fn messages_match_protocol_document() {
    let rows = table("ask");
    let asks = rows.iter().filter_map(|row| {
        let ask = quoted(row[0]).next()?;
        Some(name(&parse::<Ask>(ask).1))
    });
    assert_eq!(asks.collect::<Names>(), known::<Ask>());
    let answers = rows.iter().map(|row| {
        let answer = quoted(row[1]).next().unwrap();
        let whole = answer
            .replace("[…]", "[]")
            .replace("{…}", "{}")
            .replace('…', "");
        name(&serde_json::from_str(&whole).unwrap_or_else(|e| panic!("{answer}: {e}")))
    });
    assert_eq!(answers.collect::<Names>(), known::<Answer>());
}

#[test]
fn refusals_match_protocol_document() {
    let rows = table("refused");
    let refusals = rows.iter().map(|row| {
        let refusal = quoted(row[0]).next().unwrap();
        name(&parse::<Refusal>(refusal).1)
    });
    assert_eq!(refusals.collect::<Names>(), known::<Refusal>());
    assert!(section().contains(&format!("the {MAX_COPY} bytes")));
    assert!(section().contains(&format!(
        "{} KiB: `{{\"version\":{VERSION}",
        MAX_PACKET >> 10
    )));
}

#[test]
fn fields_match_protocol_document() {
    let (_, block) = section().split_once("```json\n").unwrap();
    let block = block.split_once("```").unwrap().0;
    let examples: Vec<Value> = serde_json::Deserializer::from_str(block)
        .into_iter()
        .collect::<Result<_, _>>()
        .unwrap();
    let mut seen = Vec::new();
    for example in examples {
        let (answer, _) = parse::<Answer>(&example.to_string());
        let (kind, holds) = match &answer {
            Answer::Region(region) => {
                Layout::try_from(region).unwrap();
                ("region", &example["region"])
            }
            Answer::Status(_) => ("status", &example["status"]),
            other => panic!("{other:?}"),
        };
        let mut found = Names::new();
        fields(holds, "", &mut found);
        let rows = table(&format!("field of a {kind}"));
        let rows = rows.iter().flat_map(|row| quoted(row[0]).map(Into::into));
        assert_eq!(rows.collect::<Names>(), found);
        seen.push(kind);
    }
    assert_eq!(seen, ["region", "status"]);
}

#[test]
fn rejects_request_with_unknown_field() {
    let asked = |field: &str| {
        let ask = format!(r#"{{"claim":{{"channel":0,"end":"producer"{field}}}}}"#);
        Request::parse(format!(r#"{{"version":{VERSION},"ask":{ask}}}"#).as_bytes())
    };
    assert!(asked("").is_ok());
    let refusal = asked(r#","wait":true"#).unwrap_err();
    assert!(matches!(refusal, InvalidRequest::Malformed(_)), "{refusal}");
}

#[test]
fn app_ignores_unknown_field_of_answer() {
    let text = r#"{"added":{"channel":2,"entries":57,"room":0}}"#;
    let newer = text.replace("}}", r#","colour":{"of":"the channel"}}}"#);
    let answers = [text, &newer].map(|text| serde_json::from_str::<Answer>(text).unwrap());
    assert_eq!(answers[0], answers[1]);
}

/// A host app does not read the superblock. So another layout, or a feature that an older program
/// must not ignore, needs another version of the requests.
#[test]
fn request_version_follows_layout_version() {
    let layouts = (layout::VERSION, layout::INCOMPATIBLE_FEATURES);
    assert_eq!((VERSION, layouts), (1, (2, 0)));
}

/// The fuzzer starts from these packets. One that is not understood shows it nothing, and a message
/// that is not among them is one that the fuzzer has to guess.
#[test]
fn fuzz_targets_begin_with_understood_packets() {
    let read = |target: &str| {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../ci/fuzz/corpus/");
        let files = std::fs::read_dir(format!("{folder}{target}")).unwrap();
        let texts: Vec<_> = files
            .map(|file| std::fs::read(file.unwrap().path()).unwrap())
            .collect();
        assert!(texts.len() > 5, "{target}");
        texts
    };
    let (mut asks, mut answers) = (Names::new(), Names::new());
    let (mut policies, mut refusals) = (Names::new(), Names::new());
    for reply in read("replies") {
        let text = String::from_utf8_lossy(&reply);
        let answer = Reply::parse(&reply).unwrap_or_else(|e| panic!("{text}: {e}"));
        if let Answer::Region(info) = &answer {
            Layout::try_from(info).unwrap();
        }
        if let Answer::Refused(refusal) = &answer {
            refusals.insert(name(&serde_json::to_value(refusal).unwrap()));
        }
        answers.insert(name(&serde_json::to_value(&answer).unwrap()));
    }
    for line in read("requests").join(&b'\n').split(|byte| *byte == b'\n') {
        if let Some((b'0'..=b'9', request)) = line.split_first()
            && let Ok(ask) = Request::parse(request)
        {
            if let Ask::AddChannel(Entry(channel)) = &ask {
                let consumer = if channel.has_consumer() {
                    "with"
                } else {
                    "without"
                };
                policies.insert(format!("{} {consumer}", channel.policy.as_str()));
            }
            asks.insert(name(&serde_json::to_value(&ask).unwrap()));
        }
    }
    assert_eq!(asks, known::<Ask>());
    assert_eq!(answers, known::<Answer>());
    assert_eq!(refusals, known::<Refusal>());
    let all = ["wait with", "drop with", "overwrite without"];
    assert_eq!(policies, all.map(str::to_owned).into());
}
