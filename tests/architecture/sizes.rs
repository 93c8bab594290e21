//! A file that is too long is usually about two things.

use std::path::{Path, PathBuf};

/// The most lines that a source has, its tests included.
const MOST_LINES: usize = 400;

/// Longer ones, each with its reason. One that is no longer too long is taken out.
const EXCEPTIONS: [(&str, &str); 1] =
    [("src/simulation/disk.rs", "one file system: what its calls do, and what of that a power cut leaves")];

/// All Rust sources of the workspace, by their path in it.
fn sources(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder").flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found
}

#[test]
fn no_file_is_about_two_things() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = sources(root);
    assert!(sources.len() > 200, "the sources are found");
    let mut faults = Vec::new();
    for path in sources {
        let lines = std::fs::read_to_string(&path).expect("a source").lines().count();
        let name = path.strip_prefix(root).expect("below the root").to_string_lossy().into_owned();
        let reason = EXCEPTIONS.iter().find(|(exception, _)| *exception == name).map(|(_, reason)| *reason);
        match (lines > MOST_LINES, reason) {
            (true, None) => faults.push(format!("{name} has {lines} lines: split it by subject")),
            (false, Some(_)) => faults.push(format!("{name} has {lines} lines, and is no exception any more")),
            (_, Some("")) => faults.push(format!("{name}: no reason is given")),
            _ => {}
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}
