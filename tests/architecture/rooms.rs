//! The rooms of the package `pintle`: which may know which; and, in every crate, that no two files know each other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::sources::{Module, code, module_of, modules, owner, paths};

/// The folders and files directly below `src`, each with those that it may use. Whatever is not here has no room.
const ROOMS: [(&str, &[&str]); 14] = [
    ("world", &[]),
    ("parse_error", &[]),
    ("tls", &[]),
    ("store", &["parse_error", "world"]),
    ("config", &["parse_error", "store", "world"]),
    ("telemetry", &["world"]),
    ("keys", &["config", "parse_error", "store", "telemetry", "world"]),
    ("kubernetes", &["parse_error", "store", "tls", "world"]),
    ("proxy", &["config", "keys", "kubernetes", "store", "telemetry", "tls", "world"]),
    ("consumers", &["config", "kubernetes", "proxy", "store", "world"]),
    ("identity", &["config", "consumers", "keys", "kubernetes", "parse_error", "store", "telemetry", "world"]),
    (
        "node",
        &[
            "config",
            "consumers",
            "identity",
            "keys",
            "kubernetes",
            "parse_error",
            "proxy",
            "store",
            "telemetry",
            "world",
        ],
    ),
    (
        "demo",
        &[
            "config",
            "consumers",
            "identity",
            "keys",
            "kubernetes",
            "node",
            "proxy",
            "store",
            "telemetry",
            "tls",
            "world",
        ],
    ),
    (
        "cli",
        &[
            "config",
            "consumers",
            "demo",
            "identity",
            "keys",
            "kubernetes",
            "node",
            "parse_error",
            "proxy",
            "store",
            "telemetry",
            "world",
        ],
    ),
];

/// The crate's root, which is in no room.
const ROOT: [&str; 2] = ["lib", "main"];

/// Which module uses which. That a module declares those below it and shows what they have, and that they use what is
/// in it, makes one room of them and is no arrow.
fn arrows(modules: &BTreeMap<Module, String>) -> BTreeSet<(Module, Module)> {
    let mut arrows = BTreeSet::new();
    for (module, code) in modules {
        let mut used: Vec<Vec<String>> = paths(code, "crate::");
        for ups in 1..=module.len() {
            let start = "super::".repeat(ups);
            let base = &module[..module.len() - ups];
            used.extend(paths(code, &start).into_iter().map(|path| [base.to_vec(), path].concat()));
        }
        for path in used {
            let Some(target) = owner(&path, modules) else { continue };
            let within = |one: &Module, other: &Module| one.starts_with(other) || other.starts_with(one);
            if !within(&target, module) && !ROOT.contains(&module[0].as_str()) {
                arrows.insert((module.clone(), target));
            }
        }
    }
    arrows
}

/// The circles of a graph: each a set of nodes of which every one leads to every other.
fn circles(arrows: &BTreeSet<(Module, Module)>) -> BTreeSet<BTreeSet<Module>> {
    let reach = |from: &Module| {
        let (mut reached, mut next) = (BTreeSet::new(), vec![from.clone()]);
        while let Some(module) = next.pop() {
            for (_, target) in arrows.iter().filter(|(source, _)| *source == module) {
                if reached.insert(target.clone()) {
                    next.push(target.clone());
                }
            }
        }
        reached
    };
    let sources: BTreeSet<Module> = arrows.iter().map(|(source, _)| source.clone()).collect();
    let reached: BTreeMap<Module, BTreeSet<Module>> =
        sources.into_iter().map(|source| (source.clone(), reach(&source))).collect();
    let mutual = |one: &Module, other: &Module| {
        reached.get(one).is_some_and(|reached| reached.contains(other))
            && reached.get(other).is_some_and(|reached| reached.contains(one))
    };
    reached
        .keys()
        .filter(|module| mutual(module, module))
        .map(|module| reached.keys().filter(|other| mutual(module, other)).cloned().collect())
        .collect()
}

/// The circles among these modules, in words.
fn faults_of_any_crate(modules: &BTreeMap<Module, String>) -> Vec<String> {
    let describe = |circle: BTreeSet<Module>| {
        let members: Vec<_> = circle.iter().map(|module| module.join("::")).collect();
        format!("a circle: {}", members.join(", "))
    };
    circles(&arrows(modules)).into_iter().map(describe).collect()
}

/// What is wrong with the arrows of the package `pintle`.
fn faults(modules: &BTreeMap<Module, String>) -> Vec<String> {
    let arrows = arrows(modules);
    let mut faults = faults_of_any_crate(modules);
    let rooms: BTreeMap<&str, &[&str]> = ROOMS.into_iter().collect();
    let known = |module: &Module| rooms.contains_key(module[0].as_str()) || ROOT.contains(&module[0].as_str());
    faults
        .extend(modules.keys().filter(|module| !known(module)).map(|module| format!("no room: {}", module.join("::"))));
    for (source, target) in &arrows {
        let (from, to) = (source[0].as_str(), target[0].as_str());
        if from != to && !rooms.get(from).is_some_and(|allowed| allowed.contains(&to)) {
            faults.push(format!("{} uses {}: {from} must not know {to}", source.join("::"), target.join("::")));
        }
    }
    faults
}

#[test]
fn no_room_knows_what_it_must_not_and_nothing_goes_in_a_circle() {
    let modules = modules(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    assert!(modules.len() > 80, "the sources are found");
    let faults = faults(&modules);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn nothing_goes_in_a_circle_in_any_other_crate() {
    let mut members = super::members();
    let support = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support");
    members.push(("pintle-test-support".to_owned(), support));
    assert!(members.len() >= 7, "{members:?}");
    let mut found = Vec::new();
    for (package, folder) in members {
        let modules = modules(&folder.join("src"));
        assert!(modules.contains_key(&vec!["lib".to_owned()]), "the sources of {package} are found");
        found.extend(faults_of_any_crate(&modules).into_iter().map(|fault| format!("{package}: {fault}")));
    }
    assert!(found.is_empty(), "{}", found.join("\n"));
}

#[test]
fn a_circle_and_a_forbidden_arrow_are_found() {
    let check = |sources: &[(&str, &str)]| {
        let modules =
            sources.iter().map(|(path, text)| (module_of(Path::new(path)), code(text))).collect::<BTreeMap<_, _>>();
        faults(&modules).join("; ")
    };
    assert_eq!(check(&[("keys/mod.rs", "mod a;"), ("keys/a.rs", "use super::Keyring;"), ("world/mod.rs", "")]), "");
    let circle =
        [("keys/mod.rs", ""), ("keys/a.rs", "use super::b::{X, y::Z};"), ("keys/b.rs", "fn f() { super::a::g() }")];
    assert_eq!(check(&circle), "a circle: keys::a, keys::b");
    let upwards = [("config/pair.rs", "use crate::{store::Journal, cli};"), ("cli/mod.rs", ""), ("store/mod.rs", "")];
    assert_eq!(check(&upwards), "config::pair uses cli: config must not know cli");
    assert_eq!(check(&[("attic/mod.rs", "")]), "no room: attic");
    let comment =
        [("store/mod.rs", "// crate::cli::main\n#[cfg(test)]\nmod tests { use crate::cli; }"), ("cli/mod.rs", "")];
    assert_eq!(check(&comment), "");
}
