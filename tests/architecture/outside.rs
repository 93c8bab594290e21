//! The operating system is reached through `src/world` alone: the lint says so to whoever compiles, and this test says
//! where the lint is switched off, and that nothing else gets past it.

use std::collections::BTreeSet;
use std::path::Path;

use super::sources::{Module, code, modules, paths};

/// The modules that may call the operating system themselves. Each says why where it allows that.
const EXCEPTIONS: [&str; 8] =
    ["cli", "demo", "keys::isolation", "keys::refused_pins", "keys::thread", "proxy", "telemetry::lines", "world"];

/// What the others must not name, by the crate it is in.
const OUTSIDE: [(&str, &[&str]); 5] = [
    ("std::", &["fs", "os::unix::fs", "thread", "time::Instant", "time::SystemTime", "time::UNIX_EPOCH"]),
    ("tokio::", &["fs", "runtime", "spawn", "task::spawn", "task::spawn_blocking", "task::spawn_local", "time"]),
    ("rustix::", &["fs", "thread"]),
    ("nix::", &["fcntl", "sys", "unistd"]),
    ("jiff::", &["Timestamp::now", "Zoned::now"]),
];

/// What clippy.toml must list: one of each kind, so that the list is not emptied by a mistake.
const DISALLOWED: [&str; 12] = [
    "std::fs::File",
    "std::fs::read",
    "std::fs::write",
    "std::path::Path::exists",
    "std::thread::sleep",
    "std::thread::spawn",
    "std::time::Instant",
    "std::time::SystemTime",
    "tokio::fs::read",
    "tokio::spawn",
    "tokio::time::sleep",
    "tokio::time::timeout",
];

/// The attribute that makes what clippy.toml lists an error.
const DENY: &str = "#![cfg_attr(not(test), deny(clippy::disallowed_methods, clippy::disallowed_types))]";

/// Whether the module is one of these or below one.
fn is_within(module: &Module, rooms: &[&str]) -> bool {
    let name = module.join("::");
    rooms.iter().any(|room| name.strip_prefix(room).is_some_and(|rest| rest.is_empty() || rest.starts_with("::")))
}

/// What of the operating system this code names.
fn named(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (krate, outside) in OUTSIDE {
        for path in paths(code, krate) {
            let path: Vec<&str> = path.iter().map(String::as_str).collect();
            let is_outside = |outside: &&str| {
                let outside: Vec<&str> = outside.split("::").collect();
                match path.split_last() {
                    // `use std::time::*`
                    Some((&"", prefix)) => outside.starts_with(prefix) || prefix.starts_with(&outside),
                    _ => path.starts_with(&outside),
                }
            };
            if outside.iter().any(is_outside) {
                found.push(format!("{krate}{}", path.join("::")));
            }
        }
    }
    found
}

/// The modules that this source of a module allows what clippy.toml lists: itself, or some that it declares.
fn allowances(module: &Module, source: &str) -> Vec<String> {
    // However it was formatted.
    let source = source.split_whitespace().collect::<Vec<_>>().join(" ").replace("\" )]", "\")]");
    let mut found = Vec::new();
    for (at, _) in source.match_indices("clippy::disallowed_") {
        let is_allowed = source[..at].rfind(['#', ']']).is_some_and(|start| {
            let attribute = source[start..].trim_start_matches(['#', '!', '[', ' ']);
            attribute.starts_with("allow") || attribute.starts_with("expect")
        });
        if !is_allowed {
            continue;
        }
        // What the attribute stands at: a module's declaration, or something else, which is then in this module.
        let item = source[at..].split_once("\")]").map(|(_, item)| item);
        let declared = item.and_then(|item| {
            let item = item.trim_start().trim_start_matches("pub ");
            item.strip_prefix("mod ").and_then(|name| name.split_once(';')).map(|(name, _)| name.to_owned())
        });
        let mut path = module.clone();
        path.retain(|name| name != "lib");
        path.push(declared.unwrap_or_else(|| "(an item)".to_owned()));
        found.push(path.join("::"));
    }
    found
}

#[test]
fn the_world_is_reached_through_world_alone() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let modules = modules(&src);
    assert!(modules.len() > 80, "the sources are found");
    let outside: Vec<_> = modules
        .iter()
        .filter(|(module, _)| !is_within(module, &EXCEPTIONS) && **module != ["main"])
        .flat_map(|(module, code)| named(code).into_iter().map(|name| format!("{} names {name}", module.join("::"))))
        .collect();
    assert!(outside.is_empty(), "{}", outside.join("\n"));
    let allowed: BTreeSet<_> = modules.iter().flat_map(|(module, code)| allowances(module, code)).collect();
    assert_eq!(allowed, EXCEPTIONS.map(str::to_owned).into(), "where the lint is switched off");
}

#[test]
fn the_lint_is_on() {
    let read = |file: &str| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).expect("a file");
    assert!(code(&read("src/lib.rs")).contains(DENY));
    let clippy: toml::Table = read("clippy.toml").parse().expect("TOML");
    let listed: BTreeSet<&str> = ["disallowed-methods", "disallowed-types"]
        .iter()
        .flat_map(|list| clippy[*list].as_array().expect("a list"))
        .map(|entry| entry["path"].as_str().expect("a path"))
        .collect();
    let missing: Vec<_> = DISALLOWED.into_iter().filter(|path| !listed.contains(path)).collect();
    assert!(missing.is_empty(), "clippy.toml does not list {missing:?}");
}

#[test]
fn the_world_outside_is_found_however_it_is_named() {
    for (code, expected) in [
        ("use std::fs;", "std::fs"),
        ("use std::{fmt, fs::File};", "std::fs::File"),
        ("let now = std::time::SystemTime::now();", "std::time::SystemTime::now"),
        ("use std::time::{Duration, Instant};", "std::time::Instant"),
        ("use std::time::*;", "std::time::"),
        ("use std::os::unix::fs::symlink;", "std::os::unix::fs::symlink"),
        ("tokio::spawn(async {})", "tokio::spawn"),
        ("tokio::task::spawn_blocking(|| 1)", "tokio::task::spawn_blocking"),
        ("use tokio::{sync::watch, time};", "tokio::time"),
        ("std::thread::spawn(|| 1)", "std::thread::spawn"),
    ] {
        assert_eq!(named(code), [expected], "{code}");
    }
    for code in ["use std::time::Duration;", "use tokio::task::JoinSet;", "use crate::world::{files, task};"] {
        assert_eq!(named(code), [""; 0], "{code}");
    }
    let allowed = |module: &str, source: &str| allowances(&vec![module.to_owned()], source);
    let allow = "#[allow(clippy::disallowed_methods, reason = \"it is one\")]\n";
    assert_eq!(allowed("store", &format!("{allow}pub mod lock;")), ["store::lock"]);
    assert_eq!(allowed("lib", &format!("{allow}mod demo;")), ["demo"]);
    assert_eq!(allowed("store", &format!("{allow}fn read() {{}}")), ["store::(an item)"]);
    assert_eq!(allowed("lib", DENY), [""; 0]);
    assert!(is_within(&vec!["cli".to_owned(), "run".to_owned()], &["cli"]));
    assert!(!is_within(&vec!["client".to_owned()], &["cli"]));
}
