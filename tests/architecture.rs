//! The arrows between the crates, and what the core must never see.

#[path = "architecture/outside.rs"]
mod outside;
#[path = "architecture/rooms.rs"]
mod rooms;
#[path = "architecture/sizes.rs"]
mod sizes;
#[path = "architecture/sources.rs"]
mod sources;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What agent-core must not depend on, however indirectly: a runtime, a network, a cluster, a backend.
const NOT_IN_THE_CORE: [&str; 12] = [
    "tokio",
    "mio",
    "async-std",
    "smol",
    "futures-executor",
    "hyper",
    "reqwest",
    "kube",
    "k8s-openapi",
    "cryptoki",
    "tss-esapi",
    "libloading",
];

/// What agent-core's sources must not name, however it was imported: a clock, a disk, a network, an environment, a
/// thread of its own.
const NOT_IN_ITS_SOURCES: [&str; 15] = [
    "fs::",
    "File",
    "std::fs",
    "Tcp",
    "Udp",
    "UnixStream",
    "SystemTime",
    "Instant",
    "UNIX_EPOCH",
    "elapsed()",
    "env::",
    "process::",
    "std::process",
    "thread::",
    "std::thread",
];

/// The modules of std that it must not import within braces either, as in `use std::{fmt, fs}`.
const NOT_IMPORTED: [&str; 5] = ["fs", "process", "thread", "env", "os"];

/// The normal dependencies of a package, itself included, however indirect.
fn dependencies(package: &str) -> BTreeSet<String> {
    let output = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()))
        .args(["tree", "--offline", "--locked", "--package", package, "--edges", "normal", "--prefix", "none"])
        .args(["--format", "{p}", "--all-features", "--target", "all"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    names(&String::from_utf8_lossy(&output.stdout))
}

/// The packages of `cargo tree --prefix none`: the first word of each line.
fn names(tree: &str) -> BTreeSet<String> {
    tree.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

/// The members of the workspace, by the name of their package and their folder.
fn members() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = |folder: &str| {
        let entries = std::fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let mut members = Vec::new();
    for folder in folders("backends").into_iter().chain([root.join("agent-core"), root.join("plugins-api")]) {
        if let Ok(manifest) = std::fs::read_to_string(folder.join("Cargo.toml")) {
            let manifest: toml::Table = manifest.parse().expect("a manifest");
            let name = manifest["package"]["name"].as_str().expect("a name").to_owned();
            members.push((name, folder));
        }
    }
    members
}

/// What of the workspace this package may depend on: plugins-api on nothing, all others here on plugins-api alone.
fn allowed(package: &str) -> &'static [&'static str] {
    if package == "pintle-plugins-api" { &[] } else { &["pintle-plugins-api"] }
}

/// The dependencies of the package that no arrow allows.
fn forbidden_dependencies(package: &str, dependencies: &BTreeSet<String>) -> Vec<String> {
    let of_the_workspace = |name: &str| name == "pintle" || name.starts_with("pintle-");
    let forbidden = |name: &&String| {
        (of_the_workspace(name) && *name != package && !allowed(package).contains(&name.as_str()))
            || (package == "pintle-agent-core" && NOT_IN_THE_CORE.contains(&name.as_str()))
    };
    dependencies.iter().filter(forbidden).cloned().collect()
}

/// The lines of a source, tests and comments left out, that name what the core must not see.
fn forbidden_lines(source: &str) -> Vec<&str> {
    // Tests are the last thing in a file.
    let code = source.split_once("#[cfg(test)]\nmod tests").map_or(source, |(code, _)| code);
    code.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .filter(|line| NOT_IN_ITS_SOURCES.iter().any(|forbidden| line.contains(forbidden)) || imports_forbidden(line))
        .collect()
}

fn imports_forbidden(line: &str) -> bool {
    let imported = line.trim_start().strip_prefix("use std::").and_then(|rest| rest.split_once('{'));
    imported.is_some_and(|(_, names)| {
        names
            .split(|character: char| !character.is_alphanumeric() && character != '_')
            .any(|name| NOT_IMPORTED.contains(&name))
    })
}

/// The Rust sources below a folder, without those that are compiled for tests alone.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let path = entry.path();
        if path.is_dir() && !path.ends_with("simulation") {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
            found.push(path);
        }
    }
    found
}

#[test]
fn arrows_hold() {
    let members = members();
    assert!(members.len() >= 3, "{members:?}");
    for (package, folder) in members {
        let dependencies = dependencies(&package);
        assert!(dependencies.contains(&package), "{} is a member", folder.display());
        assert_eq!(forbidden_dependencies(&package, &dependencies), [""; 0], "{package}");
    }
}

/// A feature that only a dev-dependency asks for has cargo compile that crate, and all that depend on it, once more: for
/// `cargo build` and rustdoc without it, for the tests and clippy with it.
#[test]
fn tests_use_the_crates_that_the_programs_are_built_of() {
    let crates = |edges: &str| {
        let output = Command::new(std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned()))
            .args(["tree", "--offline", "--locked", "--workspace", "--edges", edges, "--prefix", "none"])
            .args(["--no-dedupe", "--format", "{p} {f}"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect::<BTreeSet<_>>()
    };
    let (built, tested) = (crates("normal,build"), crates("normal,build,dev"));
    let differing: Vec<_> = built.difference(&tested).collect();
    assert!(built.len() > 100 && differing.is_empty(), "only without the tests' features: {differing:?}");
}

#[test]
fn core_sees_no_clock_no_files_and_no_network() {
    let sources = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("agent-core/src"));
    assert!(sources.len() >= 8, "{sources:?}");
    for path in sources {
        let source = std::fs::read_to_string(&path).expect("a source");
        assert_eq!(forbidden_lines(&source), [""; 0], "{}", path.display());
    }
}

#[test]
fn broken_arrows_are_noticed() {
    let tree =
        names("pintle-agent-core v0.1.0 (/w/agent-core)\nkube v5.0.0\npintle-backend-file v0.1.0 (*)\nserde v1\n");
    assert_eq!(forbidden_dependencies("pintle-agent-core", &tree), ["kube", "pintle-backend-file"]);
    let tree = names("pintle-backend-file v0.1.0\npintle-plugins-api v0.1.0\npintle-agent-core v0.1.0\ntokio v1\n");
    assert_eq!(forbidden_dependencies("pintle-backend-file", &tree), ["pintle-agent-core"]);
    let tree = names("pintle-plugins-api v0.1.0\npintle v0.1.0\n");
    assert_eq!(forbidden_dependencies("pintle-plugins-api", &tree), ["pintle"]);
    // The root package has what the core must not have: the question itself is answered.
    assert!(dependencies("pintle").contains("tokio"));
}

#[test]
fn forbidden_lines_are_noticed() {
    let source =
        "use std::fs::File;\n// std::fs\nlet now = std::time::SystemTime::now();\n#[cfg(test)]\nmod tests {\nstd::fs";
    assert_eq!(forbidden_lines(source), ["use std::fs::File;", "let now = std::time::SystemTime::now();"]);
    for line in [
        "use std::{fmt, fs, time};",
        "use std::fs;",
        "let text = fs::read(path);",
        "let now = time::UNIX_EPOCH.elapsed();",
        "let life = started.elapsed();",
        "use std::time::{Duration, Instant};",
        "use std::net::{IpAddr, TcpStream};",
        "use std::{process, thread};",
        "thread::sleep(life);",
        "let host = env::var(name);",
    ] {
        assert_eq!(forbidden_lines(line), [line]);
    }
    for line in ["use std::time::Duration;", "use std::{fmt, time};", "use std::net::IpAddr;", "// fs::read"] {
        assert_eq!(forbidden_lines(line), [""; 0]);
    }
}
