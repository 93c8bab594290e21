//! The packages of this build.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use pintle_test_support::ScratchDirectory;

use super::{Debian, succeed};

/// The agent, which cargo has built.
pub(crate) const PINTLE: &str = env!("CARGO_BIN_EXE_pintle");
/// The TPM's plugin, which cargo puts beside it: a member of the workspace, which `./tests/run` builds first.
pub(crate) const PLUGIN: &str = "libpintle_backend_tpm.so";

/// The packages of this build as version 1, and again as version 2.
pub(crate) static PACKAGES: Packages =
    Packages { first: LazyLock::new(|| built("1")), second: LazyLock::new(|| built("2")) };

/// Packages, each built when it is first needed.
pub(crate) struct Packages {
    first: LazyLock<ScratchDirectory>,
    second: LazyLock<ScratchDirectory>,
}

impl Packages {
    /// The package's file.
    pub(crate) fn file(&self, name: &str, version: &str) -> PathBuf {
        let architecture = succeed(Command::new("dpkg").arg("--print-architecture"));
        let directory = if version == "1" { &self.first } else { &self.second };
        directory.join(format!("{name}_{version}_{}.deb", architecture.trim()))
    }

    /// Copies a package into a Debian, and returns its path there.
    pub(crate) fn put(&self, debian: &Debian, name: &str, version: &str) -> String {
        let path = format!("/tmp/{name}-{version}.deb");
        debian.put(&self.file(name, version), &path);
        path
    }

    /// What is in a package, unpacked.
    pub(crate) fn unpacked(&self, name: &str) -> ScratchDirectory {
        let scratch = ScratchDirectory::new();
        succeed(Command::new("dpkg-deb").arg("--extract").arg(self.file(name, "1")).arg(scratch.path()));
        scratch
    }

    /// Builds both packages.
    pub(crate) fn build(directory: &Path, version: &str, umask: &str) {
        succeed(
            Command::new("sh")
                .args(["-c", r#"umask "$0" && exec "$@""#, umask])
                .arg(repository().join("packaging/deb/build"))
                .args(["--version", version, "--compression", "zstd", "--output"])
                .arg(directory)
                .arg(PINTLE)
                .arg(Path::new(PINTLE).with_file_name(PLUGIN))
                .env("SOURCE_DATE_EPOCH", "1700000000"),
        );
    }
}

fn built(version: &str) -> ScratchDirectory {
    let directory = ScratchDirectory::new();
    Packages::build(directory.path(), version, "022");
    directory
}

/// Where this repository is.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
