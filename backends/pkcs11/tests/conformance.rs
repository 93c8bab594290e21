//! The PKCS#11 backend keeps the promises of every backend, with each module.

mod support;

use pintle_plugins_api::conformance::{self, Harness, Situation};
use pintle_plugins_api::{BackendError, KeyAlgorithm, KeyBackend};
use support::{Kind, PIN, TestToken, id};

struct Tokens<'a> {
    token: &'a TestToken,
    arranged: Option<Situation>,
}

impl Harness for Tokens<'_> {
    fn open(&mut self) -> Result<Box<dyn KeyBackend>, BackendError> {
        Ok(Box::new(self.token.open()))
    }

    fn algorithms(&self) -> Vec<KeyAlgorithm> {
        KeyAlgorithm::ALL
            .into_iter()
            // Kryoptic has Ed25519 only with OpenSSL 3.2.
            .filter(|algorithm| self.token.kind == Kind::SoftHsm || *algorithm != KeyAlgorithm::Ed25519)
            .collect()
    }

    fn arrange(&mut self, situation: Situation) -> bool {
        // Kryoptic keeps its database open, so a token removed or replaced below it is not noticed by anybody.
        let soft_hsm = self.token.kind == Kind::SoftHsm;
        match situation {
            Situation::ForeignKey => {
                let arguments = ["--keypairgen", "--key-type", "EC:prime256v1", "--id", "0a", "--label", "theirs"];
                self.token.pkcs11_tool_logged_in(&arguments);
            }
            Situation::DeviceGone if soft_hsm => self.token.remove(),
            Situation::WrongPin => self.token.write_pin("99999999"),
            Situation::KeysLost if soft_hsm => self.token.replace(),
            Situation::DeviceGone | Situation::KeysLost => return false,
        }
        self.arranged = Some(situation);
        true
    }

    fn restore(&mut self) {
        match self.arranged.take() {
            Some(Situation::ForeignKey) => {
                for kind in ["privkey", "pubkey"] {
                    self.token.pkcs11_tool_logged_in(&["--delete-object", "--type", kind, "--id", "0a"]);
                }
            }
            Some(Situation::DeviceGone) => self.token.put_back(),
            Some(Situation::WrongPin) => self.token.write_pin(PIN),
            Some(Situation::KeysLost) | None => {}
        }
    }

    fn pin_attempts(&mut self) -> Option<u64> {
        Some(self.token.logins())
    }
}

fn conforms(token: &TestToken) {
    let mut backend = token.open();
    backend.generate(&id("node-1/client/7"), KeyAlgorithm::EcdsaP256).expect("a key");
    drop(backend);
    let report = conformance::run(&mut Tokens { token, arranged: None });
    println!("{:?}\n{report}", token.kind);
    report.assert_passed();
}

#[test]
fn c17_softhsm_conforms() {
    support::run_spied(Kind::SoftHsm, "c17_softhsm_conforms", conforms);
}

#[test]
fn c17_kryoptic_conforms() {
    support::run_spied(Kind::Kryoptic, "c17_kryoptic_conforms", conforms);
}
