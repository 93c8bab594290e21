//! A PKCS#11 module that wraps another one and injects faults.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Builds the module in `directory`, once per process. `faulty_module.c` documents the faults.
///
/// Not in a temporary directory, because the backend does not load a module that other users could replace. Tests
/// pass `CARGO_TARGET_TMPDIR`.
#[must_use]
pub fn faulty_module(directory: &Path) -> PathBuf {
    static MODULE: OnceLock<PathBuf> = OnceLock::new();
    let build = || {
        let module = directory.join("libfaulty_module.so");
        // Other test processes may build it at the same time, or have it open.
        let unfinished = module.with_extension(format!("{}.so", std::process::id()));
        let source = unfinished.with_extension("c");
        std::fs::write(&source, include_str!("faulty_module.c")).expect("the source is written");
        let mut compiler = Command::new("cc");
        compiler.args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-o"]);
        let status = compiler.arg(&unfinished).arg(&source).arg("-ldl").status();
        assert!(status.expect("a C compiler is installed").success());
        std::fs::rename(&unfinished, &module).expect("the module is in its place");
        let _ = std::fs::remove_file(source);
        module
    };
    MODULE.get_or_init(build).clone()
}
