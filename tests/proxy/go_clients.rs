//! Unmodified Kubernetes clients with a key in a device (case C18, C19).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pintle::config::ProcessIsolation;
use pintle::keys::isolation::IsolatedBackend;
use pintle::keys::{CALL_DEADLINE, Keyring, ModuleConfiguration, Opener};
use pintle::proxy::{Epoch, Upstream};
use pintle::world::clock::now;
use pintle_agent_core::Template;
use pintle_agent_core::issued::{KeyName, accept};
use pintle_plugins_api::{KeyAlgorithm, KeyId};
use pintle_test_support::{Load, ScratchDirectory, Token, TokenModule};

use crate::bed::{ApiServer, Authority, Bed, until};

const BACKEND: &str = "device";

/// A PKCS#11 token whose module runs in a child process, as in the agent.
struct Device {
    keyring: Keyring,
    scratch: ScratchDirectory,
}

impl Device {
    fn new() -> Self {
        let scratch = ScratchDirectory::new();
        let token = Token::new(TokenModule::SoftHsm, scratch.join("token"));
        let module = ModuleConfiguration::Pkcs11 {
            uri: format!("pkcs11:token={}", Token::LABEL.replace(' ', "%20")),
            module: Some(TokenModule::SoftHsm.path()),
            pin_file: Some(token.pin_file()),
        };
        let environment = token.environment().into_iter();
        let environment: BTreeMap<_, _> =
            environment.map(|(name, path)| (name.to_owned(), path.display().to_string())).collect();
        let opener = Opener::new(move || {
            let isolation = ProcessIsolation { environment: environment.clone(), ..ProcessIsolation::default() };
            let backend = IsolatedBackend::new(BACKEND, module.clone(), isolation)?;
            Ok(Box::new(backend.with_program(env!("CARGO_BIN_EXE_pintle"))))
        });
        Self { keyring: Keyring::start([(BACKEND.to_owned(), opener)]).unwrap(), scratch }
    }

    fn key_name(number: u64) -> KeyName {
        KeyName { backend: BACKEND.to_owned(), id: KeyId::new(format!("node_client_{number}")).unwrap() }
    }

    /// An epoch with a new key in the device. The server sees `system:node:NUMBER`.
    async fn epoch(&self, number: u64, authority: &Authority, upstream: &Arc<Upstream>) -> Epoch {
        let name = Self::key_name(number);
        let id = name.id.clone();
        let generate = self
            .keyring
            .backend(BACKEND)
            .unwrap()
            .call(CALL_DEADLINE, move |backend| backend.generate(&id, KeyAlgorithm::EcdsaP256));
        let public_key = generate.await.unwrap();
        let template = Template::kubelet_client(&number.to_string());
        let leaf = authority.certify(&template, &public_key);
        let credential = accept(&leaf, &template, name, &public_key, None, now()).unwrap();
        Epoch::new(&credential, &self.keyring, Duration::from_secs(5), Arc::clone(upstream)).unwrap()
    }

    async fn keys(&self) -> usize {
        self.keyring.backend(BACKEND).unwrap().call(CALL_DEADLINE, |backend| backend.list()).await.unwrap().len()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn c18_c19_no_request_of_a_go_client_fails_in_200_rotations_of_a_key_in_softhsm() {
    const ROTATIONS: u64 = 200;
    /// Each certificate is used for at least this many requests.
    const REQUESTS: u64 = 50;
    let authority = Authority::new();
    let server = ApiServer::start(&authority).await;
    let upstream = authority.upstream(&[server.address]);
    let device = Device::new();
    let first = device.epoch(0, &authority, &upstream).await;
    let mut serials = vec![first.serial.clone()];
    let bed = Bed::start(Some(first), |_, _| {}).await;

    let began = Instant::now();
    let flags = ["--get=/whoami", "--post=/whoami", "--post=/slow/3", "--interval=5ms"];
    let mut load = Load::start(&bed.kubeconfig(), &device.scratch, &flags);
    load.wait_until_running(Duration::from_secs(60));
    let served = |number: u64| server.requests_of(&format!("system:node:{number}"));
    for rotation in 1..=ROTATIONS {
        until("the certificate is used", || served(rotation - 1) >= REQUESTS).await;
        let next = device.epoch(rotation, &authority, &upstream).await;
        serials.push(next.serial.clone());
        bed.proxy.swap(next);
    }
    until("the last certificate is used", || served(ROTATIONS) >= REQUESTS).await;
    let report = load.stop();
    let took = began.elapsed();

    let statistics = bed.statistics();
    println!("{ROTATIONS} rotations in {took:?}: {}\n{statistics:?}", report.text);
    assert_eq!((report.failed, report.answered), (0, report.requests), "{}", report.text);
    assert_eq!(server.requests(), report.answered, "each request reached the server once");
    assert_eq!(statistics.failures, BTreeMap::new());
    assert_eq!(report.by.len(), 16, "{}", report.text);
    assert!(report.by.iter().all(|count| count.answered > 0), "{}", report.text);

    // As in the agent: a key is destroyed once its last connection has closed.
    for (number, serial) in serials.iter().enumerate().take(ROTATIONS as usize) {
        let unused = bed.proxy.wait_until_unused(serial);
        tokio::time::timeout(Duration::from_secs(20), unused).await.expect("an old epoch goes out of use");
        device.keyring.delete(&Device::key_name(number as u64)).await.unwrap();
    }
    assert_eq!(device.keys().await, 1);
    assert_eq!(bed.get("/whoami").await.unwrap(), format!("system:node:{ROTATIONS}"));
}
