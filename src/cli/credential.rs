//! `pintle credential`: an exec credential plugin (client.authentication.k8s.io/v1) for clients that accept a key
//! from one.

use pintle_agent_core::UnixTime;
use pintle_agent_core::issued::Leaf;
use pintle_agent_core::pem_block::PemBlocks;
use pintle_agent_core::policy::Window;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{CliError, Exit, print};
use crate::config::{Config, Flags};
use crate::store::pair::installed_at;
use crate::world::clock;

/// The part of client-go's `KUBERNETES_EXEC_INFO` that is used.
#[derive(Deserialize)]
struct ExecInfo {
    #[serde(rename = "apiVersion")]
    api_version: String,
}

/// The plugin's output.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ExecCredential<'a> {
    api_version: &'a str,
    kind: &'a str,
    status: ExecStatus<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ExecStatus<'a> {
    expiration_timestamp: String,
    client_certificate_data: &'a str,
    client_key_data: &'a str,
}

/// The supported API versions. The fields used here are the same in both.
const VERSIONS: [&str; 2] = ["client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"];

/// The arguments of `pintle credential`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// The identity [default: the only one]
    #[arg(value_name = "IDENTITY")]
    identity: Option<String>,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let version = version(std::env::var("KUBERNETES_EXEC_INFO").ok().as_deref())?;
        let config = Config::load(&self.flags)?;
        let config = config.identity(self.identity.as_deref())?;
        let current = config.pairs().current();
        let pair = config.pairs().read_current().map_err(|error| {
            let current = current.display();
            let (detail, hint) = match error.kind() {
                std::io::ErrorKind::NotFound => (format!("no pair at {current}"), "pintle run obtains one"),
                _ => (format!("the pair {current} cannot be read: {error}"), "run it as the owner of the pair"),
            };
            CliError::new(Exit::Usage, detail, hint)
        })?;
        let unusable = |detail: String| {
            CliError::new(Exit::Problem, format!("{}: {detail}", current.display()), "see pintle status")
        };
        let blocks = PemBlocks::of(&*pair);
        let parts = Parts::of(&blocks).ok_or_else(|| match blocks.damaged {
            Some(line) => unusable(format!("the PEM block that begins in line {line} is damaged")),
            None => CliError::new(
                Exit::Problem,
                format!(
                    "{} contains no private key: the key is in a device, and cannot be passed to a client",
                    current.display()
                ),
                "use the credential proxy: pintle kubeconfig --for proxy",
            ),
        })?;
        let leaf = Leaf::of(&pair).map_err(|rejection| unusable(rejection.to_string()))?;
        let now = clock::now();
        if now >= leaf.not_after {
            return Err(unusable(format!("the certificate expired at {}", leaf.not_after)));
        }
        let installed = installed_at(&current).unwrap_or(leaf.not_before);
        let window = Window::new(leaf.not_before, leaf.not_after, installed, &leaf.fingerprint);
        let credential = ExecCredential {
            api_version: version,
            kind: "ExecCredential",
            status: ExecStatus {
                expiration_timestamp: expiration(now, window.closes, leaf.not_after).to_string(),
                client_certificate_data: &parts.chain,
                client_key_data: &parts.key,
            },
        };
        print(&Zeroizing::new(super::json(&credential)?))?;
        Ok(Exit::Ok)
    }
}

/// How long the client may cache the credential: until the rotation window closes, when there should be a new one.
/// After that, half of the remaining lifetime, so the client asks more and more often, and never uses the credential
/// past notAfter.
fn expiration(now: UnixTime, closes: UnixTime, not_after: UnixTime) -> UnixTime {
    if now < closes { closes } else { now + not_after.since(now) / 2 }
}

/// The API version that the client asks for; the latest if it does not say, as when run in a terminal.
fn version(info: Option<&str>) -> Result<&'static str, CliError> {
    let Some(info) = info else { return Ok(VERSIONS[0]) };
    let asked = serde_json::from_str::<ExecInfo>(info).map(|info| info.api_version).unwrap_or_default();
    VERSIONS.into_iter().find(|version| *version == asked).ok_or_else(|| {
        CliError::new(
            Exit::Usage,
            format!("KUBERNETES_EXEC_INFO requests {asked:?}; only {} is supported", VERSIONS.join(" or ")),
            "set apiVersion: client.authentication.k8s.io/v1 in the kubeconfig's exec section",
        )
    })
}

/// The certificate chain and private key of a pair, without other text in the file.
struct Parts {
    chain: String,
    key: Zeroizing<String>,
}

impl Parts {
    /// `None` if the pair does not contain its key.
    fn of(pair: &PemBlocks) -> Option<Self> {
        let key = pair.private_key()?.to_pem();
        let certificates = pair.blocks.iter().filter(|block| block.label == "CERTIFICATE");
        Some(Self { chain: certificates.map(|block| block.to_pem().to_string()).collect(), key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n";
    const KEY: &str = "-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n";

    #[test]
    fn a_pair_is_parsed_wherever_its_key_is() {
        for pair in [
            format!("{CERTIFICATE}{CERTIFICATE}{KEY}"),
            format!("{KEY}{CERTIFICATE}{CERTIFICATE}"),
            format!("of worker-1\n{CERTIFICATE}more\n{CERTIFICATE}{KEY}-----BEGIN CERTIFICATE-----\nAA"),
        ] {
            let parts = Parts::of(&PemBlocks::of(&pair)).expect("a key");
            assert_eq!((parts.chain, parts.key.as_str()), (format!("{CERTIFICATE}{CERTIFICATE}"), KEY));
        }
        assert!(Parts::of(&PemBlocks::of(CERTIFICATE)).is_none());
        let in_a_device = format!("{CERTIFICATE}{}", KEY.replace("PRIVATE", "TSS2 PRIVATE"));
        assert!(Parts::of(&PemBlocks::of(&in_a_device)).is_none());
    }

    #[test]
    fn the_credential_expires_when_a_new_certificate_is_due() {
        let at = UnixTime::from_seconds;
        assert_eq!(expiration(at(10), at(90), at(100)), at(90));
        assert_eq!(expiration(at(92), at(90), at(100)), at(96));
    }

    #[test]
    fn the_clients_api_version_is_used_and_unknown_ones_are_errors() {
        let info = |version: &str| format!(r#"{{"apiVersion":"{version}","kind":"ExecCredential","spec":{{}}}}"#);
        for known in VERSIONS {
            assert_eq!(version(Some(&info(known))).expect("known"), known);
        }
        assert_eq!(version(None).expect("the latest"), VERSIONS[0]);
        for other in [info("client.authentication.k8s.io/v1alpha1"), "nonsense".to_owned()] {
            assert!(version(Some(&other)).expect_err("refused").detail.contains("KUBERNETES_EXEC_INFO"));
        }
    }
}
