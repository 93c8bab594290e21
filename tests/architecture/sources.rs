//! Rust sources, read as far as it takes to see which module names what.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A module by the names on its path: `src/keys/isolation/mod.rs` is `keys::isolation`.
pub(super) type Module = Vec<String>;

/// The code of a source without comments and without what is compiled for tests alone, which is the last thing in it.
pub(super) fn code(source: &str) -> String {
    let code = source.split_once("#[cfg(test)]\nmod tests").map_or(source, |(code, _)| code);
    code.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code)).collect::<Vec<_>>().join("\n")
}

/// All modules below `src` with their code. The simulation is compiled for tests alone.
pub(super) fn modules(src: &Path) -> BTreeMap<Module, String> {
    let mut modules = BTreeMap::new();
    let mut folders = vec![src.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() && path != src.join("simulation") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
                let text = std::fs::read_to_string(&path).expect("a source");
                modules.insert(module_of(path.strip_prefix(src).expect("below src")), code(&text));
            }
        }
    }
    modules
}

pub(super) fn module_of(path: &Path) -> Module {
    let path: PathBuf = path.with_extension("");
    let mut names: Module = path.iter().map(|name| name.to_string_lossy().into_owned()).collect();
    names.pop_if(|name| *name == "mod");
    names
}

/// The paths that a piece of code begins at `start` (`crate::` or `super::`), with braces written out.
pub(super) fn paths(code: &str, start: &str) -> Vec<Vec<String>> {
    code.match_indices(start)
        .filter(|(at, _)| {
            !code[..*at].ends_with(|before: char| before.is_alphanumeric() || before == '_' || before == ':')
        })
        .flat_map(|(at, _)| expand(&code[at + start.len()..]).0)
        .collect()
}

/// What a use tree names, as lists of names, and how long its text is.
fn expand(text: &str) -> (Vec<Vec<String>>, usize) {
    let (mut at, mut name) = (0, String::new());
    let mut prefix: Vec<String> = Vec::new();
    let bytes = text.as_bytes();
    while at < bytes.len() {
        let byte = bytes[at];
        if byte.is_ascii_alphanumeric() || byte == b'_' {
            name.push(byte.into());
            at += 1;
        } else if text[at..].starts_with("::") {
            prefix.push(std::mem::take(&mut name));
            at += 2;
        } else if byte == b'{' && name.is_empty() {
            let mut found = Vec::new();
            at += 1;
            while at < bytes.len() && bytes[at] != b'}' {
                if bytes[at].is_ascii_whitespace() || bytes[at] == b',' {
                    at += 1;
                    continue;
                }
                let (inner, length) = expand(&text[at..]);
                found.extend(inner.into_iter().map(|path| [prefix.clone(), path].concat()));
                at += length.max(1);
            }
            return (found, at + 1);
        } else {
            break;
        }
    }
    prefix.push(name);
    (vec![prefix], at)
}

/// The module that a path names something in: the longest part of it that is one.
pub(super) fn owner(path: &[String], modules: &BTreeMap<Module, String>) -> Option<Module> {
    (1..=path.len()).rev().map(|length| path[..length].to_vec()).find(|module| modules.contains_key(module))
}
