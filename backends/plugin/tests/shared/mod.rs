//! Compiling plugins, and opening them where this user, who need not be root, put them.

use std::path::{Path, PathBuf};
use std::process::Command;

use pintle_backend_plugin::{PluginBackend, Trust};
use pintle_plugins_api::BackendError;

/// The repository's directory of plugins-api, which holds the header and the sample.
pub(crate) fn plugins_api() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins-api").canonicalize().expect("it is in the repository")
}

/// A directory on a path that nobody else can write to.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a scratch directory")
}

/// Runs a program, and fails with its words.
pub(crate) fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&output.stderr));
}

pub(crate) fn open(plugin: &Path, configuration: &str) -> Result<PluginBackend, BackendError> {
    let trust = Trust { owner: rustix::process::geteuid().as_raw(), ..Trust::default() };
    PluginBackend::open_with(&trust, &plugin.display().to_string(), configuration)
}
