//! The sample plugin builds with the committed header and keeps the promises of every backend.

mod shared;

use std::path::PathBuf;
use std::process::Command;

use pintle_plugins_api::conformance::{self, Harness, Situation};
use pintle_plugins_api::{BackendError, BackendErrorKind, KeyAlgorithm, KeyBackend, KeyId};

struct Sample {
    scratch: tempfile::TempDir,
    plugin: PathBuf,
}

impl Sample {
    fn new() -> Self {
        let scratch = shared::scratch();
        let plugin = scratch.path().join("libsample_file_backend.so");
        let mut make = Command::new("make");
        make.arg("--directory").arg(shared::plugins_api().join("sample"));
        shared::run(make.arg(format!("OUTPUT={}", plugin.display())));
        std::fs::create_dir(scratch.path().join("keys")).expect("a directory for keys");
        Self { scratch, plugin }
    }
}

impl Harness for Sample {
    fn open(&mut self) -> Result<Box<dyn KeyBackend>, BackendError> {
        let configuration = format!(r#"{{"directory": "{}"}}"#, self.scratch.path().join("keys").display());
        Ok(Box::new(shared::open(&self.plugin, &configuration)?))
    }

    fn algorithms(&self) -> Vec<KeyAlgorithm> {
        vec![KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Rsa2048, KeyAlgorithm::Ed25519]
    }

    fn arrange(&mut self, situation: Situation) -> bool {
        let keys = self.scratch.path().join("keys");
        match situation {
            Situation::ForeignKey => std::fs::write(keys.join("of-somebody-else.pem"), "a key").is_ok(),
            _ => false,
        }
    }

    fn restore(&mut self) {
        let _ = std::fs::remove_file(self.scratch.path().join("keys/of-somebody-else.pem"));
    }
}

#[test]
fn sample_plugin_conforms() {
    let report = conformance::run(&mut Sample::new());
    println!("{report}");
    assert!(report.passed(), "{report}");
}

#[test]
fn sample_plugin_says_what_is_wrong() {
    let mut sample = Sample::new();
    for configuration in ["", "{}", r#"{"directory": "relative"}"#, r#"{"directory": "/x"} more"#] {
        let error = shared::open(&sample.plugin, configuration).map(|_| ()).expect_err(configuration);
        assert_eq!(error.kind, BackendErrorKind::Unsupported, "{error:?}");
    }
    let absent = shared::open(&sample.plugin, r#"{"directory": "/nothing/here"}"#).map(|_| ()).expect_err("absent");
    assert_eq!(absent.kind, BackendErrorKind::Unavailable);
    assert_eq!(absent.hint.as_deref(), Some("create or mount it"));

    let id = KeyId::new(*b"a").expect("a key id");
    std::fs::write(sample.scratch.path().join("keys/61.pem"), "torn").expect("a torn key");
    let mut backend = sample.open().expect("it opens");
    let torn = backend.public_key(&id).expect_err("torn");
    assert_eq!(torn.kind, BackendErrorKind::Corrupt);
    assert_eq!(torn.hint.as_deref(), Some("restore it from a backup, or remove it"));
    assert_eq!(backend.generate(&id, KeyAlgorithm::EcdsaP256), Err(torn), "it is not replaced");

    // A directory that is unmounted is not one without keys.
    std::fs::rename(sample.scratch.path().join("keys"), sample.scratch.path().join("unmounted")).expect("renamed");
    let kind = |error: BackendError| error.kind;
    assert_eq!(backend.public_key(&id).map_err(kind), Err(BackendErrorKind::Unavailable));
    assert_eq!(backend.delete(&id).map_err(kind), Err(BackendErrorKind::Unavailable));
    assert_eq!(backend.list().map_err(kind), Err(BackendErrorKind::Unavailable));
}

#[test]
fn plugins_that_others_could_have_written_are_not_loaded() {
    use std::os::unix::fs::{PermissionsExt, symlink};
    let sample = Sample::new();
    let refused = |path: &std::path::Path, words: &str| {
        let error = shared::open(path, "{}").map(|_| ()).expect_err(words);
        assert_eq!(error.kind, BackendErrorKind::Corrupt, "{error:?}");
        assert!(error.detail.contains(words) && error.hint.is_some(), "{error:?}");
    };
    let set_mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("the mode can be set");
    };
    let link = sample.scratch.path().join("link.so");
    symlink(&sample.plugin, &link).expect("a link");
    refused(&link, "symbolic link");
    let directory_link = sample.scratch.path().join("directory");
    symlink(sample.scratch.path(), &directory_link).expect("a link");
    refused(&directory_link.join("libsample_file_backend.so"), "symbolic link");
    for mode in [0o777, 0o775, 0o757] {
        set_mode(&sample.plugin, mode);
        refused(&sample.plugin, "others than its owner can write to it");
    }
    set_mode(&sample.plugin, 0o755);
    set_mode(sample.scratch.path(), 0o777);
    refused(&sample.plugin, "others than its owner can write to it");
    set_mode(sample.scratch.path(), 0o700);
    let error = shared::open(&sample.plugin, "{}").map(|_| ()).expect_err("loaded, and given a wrong configuration");
    assert_eq!(error.kind, BackendErrorKind::Unsupported);
}
