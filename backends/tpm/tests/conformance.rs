//! The backend keeps the promises of every backend, linked directly and loaded over the C ABI.

mod swtpm;

use std::path::Path;
use std::process::Command;

use pintle_backend_plugin::{PluginBackend, Trust};
use pintle_backend_tpm::TpmBackend;
use pintle_plugins_api::conformance::{self, Harness, Situation};
use pintle_plugins_api::{BackendError, KeyAlgorithm, KeyBackend};
use swtpm::Swtpm;

struct Device {
    swtpm: Swtpm,
    /// The shared object; `None` for the backend linked into this test.
    plugin: Option<(Trust, String)>,
    arranged: Option<Situation>,
}

impl Harness for Device {
    fn open(&mut self) -> Result<Box<dyn KeyBackend>, BackendError> {
        let configuration = self.swtpm.configuration();
        match &self.plugin {
            None => Ok(Box::new(TpmBackend::open(&configuration)?)),
            Some((trust, path)) => {
                let (tcti, directory) = (configuration.tcti, configuration.directory.display());
                let json = format!(r#"{{"tcti": "{tcti}", "directory": "{directory}", "make_directory": true}}"#);
                Ok(Box::new(PluginBackend::open_with(trust, path, &json)?))
            }
        }
    }

    fn algorithms(&self) -> Vec<KeyAlgorithm> {
        vec![KeyAlgorithm::EcdsaP256, KeyAlgorithm::EcdsaP384, KeyAlgorithm::Rsa2048, KeyAlgorithm::Rsa3072]
    }

    fn arrange(&mut self, situation: Situation) -> bool {
        match situation {
            Situation::ForeignKey => {
                self.swtpm.run("tpm2_createprimary", &["-C", "o", "-G", "ecc", "-c", "foreign.ctx"]);
                self.swtpm.run("tpm2_evictcontrol", &["-C", "o", "-c", "foreign.ctx", "0x81000001"]);
                self.swtpm.run("tpm2_flushcontext", &["-t"]);
            }
            Situation::DeviceGone => self.swtpm.stop(),
            Situation::KeysLost => drop(self.swtpm.run("tpm2_clear", &["-c", "lockout"])),
            // Keys have no PIN.
            Situation::WrongPin => return false,
        }
        self.arranged = Some(situation);
        true
    }

    fn restore(&mut self) {
        match self.arranged.take() {
            Some(Situation::ForeignKey) => {
                self.swtpm.run("tpm2_evictcontrol", &["-C", "o", "-c", "0x81000001"]);
            }
            Some(Situation::DeviceGone) => self.swtpm.start(),
            _ => {}
        }
    }
}

#[test]
fn linked_directly() {
    conforms(None);
}

#[test]
fn loaded_as_a_plugin() {
    // Nothing links to the shared object, so cargo builds it only when it is asked to. With the features of the whole
    // workspace, as everything else is built: those of this package alone would have its dependencies compiled once more.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("it is in the target directory");
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--workspace", "--lib", "--target-dir"])
        .arg(target)
        .status()
        .expect("cargo runs");
    assert!(built.success());
    let path = target.join("debug/libpintle_backend_tpm.so").canonicalize().expect("it was built");
    let trust = Trust { owner: rustix::process::geteuid().as_raw(), ..Trust::default() };
    conforms(Some((trust, path.display().to_string())));
}

fn conforms(plugin: Option<(Trust, String)>) {
    let report = conformance::run(&mut Device { swtpm: Swtpm::new(), plugin, arranged: None });
    println!("{report}");
    assert!(report.passed(), "{report}");
}
