//! The file backend keeps the promises of every backend.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use pintle_backend_file::FileBackend;
use pintle_plugins_api::conformance::{self, Harness, Situation};
use pintle_plugins_api::{BackendError, KeyAlgorithm, KeyBackend, KeyId, KeyReference, Resource};

/// A key directory that can go away and come back.
struct Files {
    directory: PathBuf,
    arranged: Option<Situation>,
}

impl Files {
    fn elsewhere(&self) -> PathBuf {
        self.directory.with_extension("elsewhere")
    }
}

impl Harness for Files {
    fn open(&mut self) -> Result<Box<dyn KeyBackend>, BackendError> {
        Ok(Box::new(FileBackend::open(&self.directory)?))
    }

    fn algorithms(&self) -> Vec<KeyAlgorithm> {
        KeyAlgorithm::ALL.to_vec()
    }

    fn arrange(&mut self, situation: Situation) -> bool {
        match situation {
            Situation::ForeignKey => write_foreign_files(&self.directory),
            Situation::DeviceGone => fs::rename(&self.directory, self.elsewhere()).expect("the directory moved away"),
            Situation::KeysLost => {
                for entry in fs::read_dir(&self.directory).expect("the directory") {
                    fs::remove_file(entry.expect("an entry").path()).expect("the file removed");
                }
            }
            // There is no PIN.
            Situation::WrongPin => return false,
        }
        self.arranged = Some(situation);
        true
    }

    fn restore(&mut self) {
        match self.arranged.take() {
            Some(Situation::ForeignKey) => remove_foreign_files(&self.directory),
            Some(Situation::DeviceGone) => fs::rename(self.elsewhere(), &self.directory).expect("the directory back"),
            _ => {}
        }
    }
}

const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n";
const ANOTHER_FORMAT: &str = "-----BEGIN EC PRIVATE KEY-----\nMAA=\n-----END EC PRIVATE KEY-----\n";
const KEY: &str = "-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n";

fn write_foreign_files(directory: &Path) {
    for (name, content) in [
        ("ca.pem", CERTIFICATE),
        ("their-key.pem", ANOTHER_FORMAT),
        ("key.pem.bak", KEY),
        ("%zz.pem", KEY),
        ("with space.pem", KEY),
        (".hidden.pem", KEY),
    ] {
        fs::write(directory.join(name), content).expect("a foreign file");
        fs::set_permissions(directory.join(name), Permissions::from_mode(0o600)).expect("its mode");
    }
    fs::create_dir(directory.join("folder.pem")).expect("a folder");
    std::os::unix::fs::symlink("key.pem.bak", directory.join("link.pem")).expect("a symbolic link");
}

fn remove_foreign_files(directory: &Path) {
    fs::remove_dir(directory.join("folder.pem")).expect("the folder removed");
    for name in ["ca.pem", "their-key.pem", "key.pem.bak", "%zz.pem", "with space.pem", ".hidden.pem", "link.pem"] {
        // Keys lost, foreign files lost.
        let _ = fs::remove_file(directory.join(name));
    }
}

#[test]
fn c17_file_backend_conforms_with_every_algorithm() {
    let parent = tempfile::tempdir().expect("a directory");
    let directory = parent.path().join("keys");
    let mut backend = FileBackend::open(&directory).expect("the backend");
    backend.generate(&KeyId::new(*b"node-1/client/7").expect("an id"), KeyAlgorithm::EcdsaP256).expect("a key");

    let report = conformance::run(&mut Files { directory: directory.clone(), arranged: None });
    println!("{report}");
    report.assert_passed();
    let left: Vec<_> = fs::read_dir(&directory).expect("the directory").collect();
    assert_eq!(left.len(), 0, "all keys were lost at the end, and the throwaway ones deleted: {left:?}");
}

#[test]
fn reference_is_the_file_that_openssl_reads() {
    let directory = tempfile::tempdir().expect("a directory");
    fs::set_permissions(directory.path(), Permissions::from_mode(0o700)).expect("its mode");
    let mut backend = FileBackend::open(directory.path()).expect("the backend");
    for algorithm in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Rsa2048, KeyAlgorithm::Ed25519] {
        let id = KeyId::new(format!("node-1/client/{algorithm}")).expect("an id");
        let public_key = backend.generate(&id, algorithm).expect("a key");
        let Ok(KeyReference::File(path)) = backend.reference(&id) else { panic!("not a file") };
        assert_eq!(path, directory.path().join(format!("node-1%2Fclient%2F{algorithm}.pem")));
        assert_eq!(fs::metadata(&path).expect("the file").permissions().mode() & 0o7777, 0o600);
        let output = std::process::Command::new("openssl")
            .args(["pkey", "-pubout", "-outform", "DER", "-in"])
            .arg(&path)
            .output()
            .expect("openssl, which the test command installs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout, public_key.as_der(), "{algorithm}");
    }
    assert_eq!(backend.usage(), Ok(vec![Resource::new("files", 4, None)]), "one for each key");
}
