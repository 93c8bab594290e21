//! The Debian packages of this build.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use pintle_test_support::ScratchDirectory;

use super::{Debian, succeed};

/// The agent, built by cargo.
pub(crate) const PINTLE: &str = env!("CARGO_BIN_EXE_pintle");
/// The TPM plugin, built by cargo next to it: a workspace member that `./tests/run` builds first.
pub(crate) const PLUGIN: &str = "libpintle_backend_tpm.so";

/// The packages of this build as version 1 and as version 2.
pub(crate) static PACKAGES: Packages =
    Packages { first: LazyLock::new(|| built("1")), second: LazyLock::new(|| built("2")) };

/// A version's packages, built when first needed.
pub(crate) struct Packages {
    first: LazyLock<ScratchDirectory>,
    second: LazyLock<ScratchDirectory>,
}

impl Packages {
    /// The path of a package.
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

    /// A directory with a package's unpacked contents.
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

/// The root of this repository.
pub(crate) fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}
