//! Keys in devices: bootstrap and ten rotations with each device and a real control plane, and use of the published
//! pair by other programs.

mod device;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use device::{DEADLINE, Node, certified_key, children, events, succeed, tpm_plugin};
use pintle_test_support::{
    Agent, BootstrapCredential, ControlPlane, Options, ReservedPorts, ResourceManager, ScratchDirectory, Swtpm, Token,
    TokenModule, eventually, private_keys_in_files, private_keys_in_memory,
};

/// Long enough that a busy machine still rotates in the last tenth.
const LIFE: &str = "15s";
const ROTATIONS: usize = 10;
/// Twice the time of ten rotations, each at nine tenths of the lifetime.
const PATIENCE: Duration = Duration::from_secs(400);

static CONTROL_PLANE: LazyLock<ControlPlane> =
    LazyLock::new(|| ControlPlane::start(Options { cluster_signing_duration: LIFE.into(), ..Options::default() }));

/// A device that holds keys, as seen by programs other than pintle.
trait Device: Sync {
    /// The number of keys in it.
    fn count(&self) -> usize;
    /// The public keys in it (DER SubjectPublicKeyInfo), after checking that none of the private keys can be
    /// exported.
    fn inspect(&self) -> Vec<Vec<u8>>;
    /// Whether the module's process is also free of private keys. A software token keeps them in that process's
    /// memory.
    fn keeps_keys_elsewhere(&self) -> bool;
}

impl Device for Token {
    fn count(&self) -> usize {
        self.keys().len()
    }

    fn inspect(&self) -> Vec<Vec<u8>> {
        let inspect = |key: pintle_test_support::TokenKey| {
            for attribute in ["sensitive", "always sensitive", "never extractable", "local"] {
                assert!(key.access.iter().any(|access| access == attribute), "not {attribute}: {key:?}");
            }
            assert_eq!(key.usage, ["sign"], "{key:?}");
            self.tool(&["--read-object", "--type", "pubkey", "--id", &key.id])
        };
        self.keys().into_iter().map(inspect).collect()
    }

    fn keeps_keys_elsewhere(&self) -> bool {
        false
    }
}

/// A TPM, and the directory with the key blobs that only it can load.
struct Tpm {
    swtpm: Swtpm,
    directory: std::path::PathBuf,
}

impl Device for Tpm {
    fn count(&self) -> usize {
        let entries = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
        entries.filter(|entry| entry.file_name().to_string_lossy().ends_with(".tss2.pem")).count()
    }

    fn inspect(&self) -> Vec<Vec<u8>> {
        let files = std::fs::read_dir(&self.directory).expect("the directory of the blobs").flatten();
        let inspect = |file: std::fs::DirEntry| {
            let text = std::fs::read_to_string(file.path()).expect("a blob can be read");
            load_and_check(&self.swtpm, &text)
        };
        files.filter(|file| file.file_name().to_string_lossy().ends_with(".tss2.pem")).map(inspect).collect()
    }

    fn keeps_keys_elsewhere(&self) -> bool {
        true
    }
}

/// Loads a `TSS2 PRIVATE KEY` below the storage primary with tpm2-tools, checks the attributes that the TPM reports,
/// and returns its public key.
fn load_and_check(swtpm: &Swtpm, pem: &str) -> Vec<u8> {
    let blob = pem::parse(pem).expect("PEM");
    assert_eq!(blob.tag(), "TSS2 PRIVATE KEY");
    // SEQUENCE { OID, [0] emptyAuth, INTEGER parent, OCTET STRING TPM2B_PUBLIC, OCTET STRING TPM2B_PRIVATE }
    let (_, fields) = element(blob.contents());
    let bytes: Vec<&[u8]> = elements(fields).into_iter().filter(|(tag, _)| *tag == 4).map(|(_, value)| value).collect();
    std::fs::write(swtpm.join("key.pub"), bytes[0]).expect("the public area is written");
    std::fs::write(swtpm.join("key.priv"), bytes[1]).expect("the sealed private area is written");
    let attributes = "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt";
    let run = |program, arguments: &[&str]| {
        let said = swtpm.run(program, arguments);
        // Without a resource manager, loaded objects stay in the TPM, which has three slots.
        swtpm.run("tpm2_flushcontext", &["-t"]);
        said
    };
    run("tpm2_createprimary", &["-Q", "-C", "o", "-G", "ecc", "-a", attributes, "-c", "primary.ctx"]);
    run("tpm2_load", &["-Q", "-C", "primary.ctx", "-u", "key.pub", "-r", "key.priv", "-c", "key.ctx"]);
    let public = run("tpm2_readpublic", &["-c", "key.ctx", "-f", "der", "-o", "key.der"]);
    let public = String::from_utf8_lossy(&public).into_owned();
    for attribute in ["fixedtpm", "fixedparent", "sensitivedataorigin", "sign"] {
        assert!(public.contains(attribute), "not {attribute}: {public}");
    }
    assert!(!public.contains("decrypt"), "{public}");
    std::fs::read(swtpm.join("key.der")).expect("the public key")
}

/// The first DER element: its tag and content.
fn element(der: &[u8]) -> (u8, &[u8]) {
    elements(der)[0]
}

/// A sequence of DER elements.
fn elements(mut der: &[u8]) -> Vec<(u8, &[u8])> {
    let mut elements = Vec::new();
    while let [tag, first, rest @ ..] = der {
        let (length, rest) = match first {
            0x81 => (usize::from(rest[0]), &rest[1..]),
            0x82 => (usize::from(rest[0]) << 8 | usize::from(rest[1]), &rest[2..]),
            short => (usize::from(*short), rest),
        };
        elements.push((*tag, &rest[..length]));
        der = &rest[length..];
    }
    elements
}

/// Starts an agent for this node and waits until its first certificate is proven.
fn enrol(node: &Node) -> Agent {
    let bootstrap = CONTROL_PLANE.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
    node.bootstrap_with(&std::fs::read_to_string(bootstrap).expect("the bootstrap kubeconfig"));
    let mut agent = node.start();
    agent.wait_for_log("the first certificate is held", DEADLINE, |line| line["event"] == "holding");
    agent
}

/// Waits until the agent is idle, then calls `look`; repeats this if a rotation began in between.
#[track_caller]
fn when_idle<T>(agent: &mut Agent, look: impl Fn() -> T) -> T {
    let begun = |agent: &Agent| events(agent, "rotation_started");
    agent.wait_for("an idle moment", DEADLINE, |agent| {
        let before = begun(agent);
        let last = agent.log().last()?["event"].as_str()?.to_owned();
        if last != "holding" {
            return None;
        }
        let seen = look();
        (begun(agent) == before).then_some(seen)
    })
}

/// Waits for ten rotations after bootstrap, and checks the device before, during and after them.
fn check_ten_rotations(node: &Node, agent: &mut Agent, device: &dyn Device) {
    let end = Instant::now() + PATIENCE;
    let mut published = BTreeSet::new();
    while events(agent, "keys_retired") < ROTATIONS {
        assert!(Instant::now() < end, "{} rotations so far:\n{}", events(agent, "keys_retired"), agent.output());
        agent.process().assert_running();
        let held = device.count();
        assert!(held <= 2, "{held} keys in the device");
        published.insert(certified_key(&node.pair()));
        std::thread::sleep(Duration::from_millis(300));
    }
    // Sampling may miss one.
    assert!(published.len() >= ROTATIONS, "each rotation has a new key: {} were seen", published.len());

    // The device contains only the key of the certificate.
    let (certified, held) = when_idle(agent, || (certified_key(&node.pair()), device.inspect()));
    assert_eq!(held, [certified]);
    // The API server accepts it.
    let user = format!("system:node:{}", node.name);
    assert!(agent.log().iter().any(|line| line["event"] == "identity_proven" && line["user"] == user.as_str()));
    let certificates: BTreeSet<_> = CONTROL_PLANE
        .audit_events()
        .into_iter()
        .filter(|event| event.username == user)
        .filter_map(|event| event.certificate_sha256)
        .collect();
    assert!(certificates.len() >= ROTATIONS, "the API server has seen {} certificates", certificates.len());
}

/// Checks that no private key is on disk, in the log, or in the agent's memory.
fn check_no_private_key(node: &Node, agent: &mut Agent, device: &dyn Device) {
    assert_eq!(private_keys_in_files(node.scratch.path()), Vec::<String>::new());
    let process = agent.process().id();
    let isolated = children(process);
    assert_eq!(isolated.len(), 1, "one process holds the module");
    let mut searched = vec![process];
    if device.keeps_keys_elsewhere() {
        searched.extend(isolated);
    }
    for process in searched {
        let findings = when_idle(agent, || private_keys_in_memory(process, &certified_key(&node.pair())));
        assert_eq!(findings.expect("memory can be read"), Vec::<String>::new());
    }
}

fn rotates_in(module: TokenModule) {
    let mut node = Node::new(if module == TokenModule::SoftHsm { "softhsm" } else { "kryoptic" });
    // Outside the node's directories: a software token stores its keys, encrypted or not, on disk.
    let storage = ScratchDirectory::new();
    let token = Token::new(module, storage.join("token"));
    node.set_environment(token.environment());
    node.configure("device", "", &[("device", &token.table())]);
    let mut agent = enrol(&node);
    check_ten_rotations(&node, &mut agent, &token);
    check_no_private_key(&node, &mut agent, &token);
    agent.terminate(DEADLINE);
    another_program_signs(&node, &token);
}

/// Signs with the published certificate's key using pkcs11-tool.
fn another_program_signs(node: &Node, token: &Token) {
    let key = token.keys().pop().expect("the key in use");
    let file = |name: &str| node.scratch.join(name).display().to_string();
    let _ = node.scratch.write("digest", [7; 32]);
    succeed(
        Command::new("openssl")
            .args(["x509", "-noout", "-pubkey", "-out", &file("public.pem"), "-in"])
            .arg(node.pair()),
    );
    let _ = token.tool(&[
        "--sign",
        "--id",
        &key.id,
        "--mechanism",
        "ECDSA",
        "--signature-format",
        "openssl",
        "--input-file",
        &file("digest"),
        "--output-file",
        &file("signature"),
    ]);
    verify_digest(node);
}

fn verify_digest(node: &Node) {
    let file = |name: &str| node.scratch.join(name).display().to_string();
    let verify = ["pkeyutl", "-verify", "-pubin", "-inkey", &file("public.pem"), "-in", &file("digest"), "-sigfile"];
    succeed(Command::new("openssl").args(verify).arg(file("signature")));
}

/// C18.
#[test]
fn c18_softhsm_keeps_the_keys_of_ten_rotations() {
    rotates_in(TokenModule::SoftHsm);
}

/// C18.
#[test]
fn c18_kryoptic_keeps_the_keys_of_ten_rotations() {
    rotates_in(TokenModule::Kryoptic);
}

/// C18. OpenSSL can use the published pair on the machine with this TPM.
#[test]
fn c18_tpm_keeps_the_keys_of_ten_rotations() {
    let node = Node::new("tpm");
    let swtpm = Swtpm::new(node.scratch.join("tpm-device"));
    node.configure("device", "", &[("device", &swtpm.table(&tpm_plugin()))]);
    let device = Tpm { swtpm, directory: node.scratch.join("state/tpm") };
    let mut agent = enrol(&node);
    check_ten_rotations(&node, &mut agent, &device);
    check_no_private_key(&node, &mut agent, &device);
    agent.terminate(DEADLINE);
    for handles in ["handles-transient", "handles-persistent", "handles-loaded-session"] {
        let listed = device.swtpm.run("tpm2_getcap", &[handles]);
        assert_eq!(String::from_utf8_lossy(&listed).trim(), "", "{handles}");
    }
    openssl_signs_with_the_pair(&node, &device.swtpm);
    openssl_serves_the_pair(&node, &device.swtpm);
}

const PROVIDERS: [&str; 6] = ["-provider", "tpm2", "-provider", "default", "-propquery", "?provider=tpm2"];

fn openssl_signs_with_the_pair(node: &Node, swtpm: &Swtpm) {
    let pair = node.pair().display().to_string();
    let file = |name: &str| node.scratch.join(name).display().to_string();
    std::fs::write(file("message"), "a message").expect("the message is written");
    let sign = ["dgst", "-sha256", "-sign", &pair, "-out", &file("signature")];
    swtpm.run("openssl", &[&sign[..], &PROVIDERS, &[&file("message")]].concat());
    succeed(Command::new("openssl").args(["x509", "-noout", "-pubkey", "-out", &file("public.pem"), "-in", &pair]));
    let verify =
        ["dgst", "-sha256", "-verify", &file("public.pem"), "-signature", &file("signature"), &file("message")];
    succeed(Command::new("openssl").args(verify));
}

/// A handshake proves that the server can use the key. A TLS server uses more of the TPM's slots than there are, so
/// it needs a resource manager, as on any machine with `/dev/tpmrm0`.
fn openssl_serves_the_pair(node: &Node, swtpm: &Swtpm) {
    let pair = node.pair().display().to_string();
    let ports = ReservedPorts::one();
    let address = format!("127.0.0.1:{}", ports.port(0));
    let serve = ["s_server", "-accept", &address, "-cert", &pair, "-key", &pair, "-quiet"];
    let mut command = swtpm.command("openssl", &[&serve[..], &PROVIDERS].concat());
    let manager = ResourceManager::new(swtpm);
    let mut server =
        manager.apply_to(&mut command).stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("openssl starts");
    let served = pintle_test_support::holds_within(Duration::from_secs(20), || {
        let output =
            Command::new("openssl").args(["s_client", "-connect", &address]).stdin(Stdio::null()).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        (text.contains("-----BEGIN CERTIFICATE-----") && text.contains("Peer signature type: ECDSA")).then_some(text)
    });
    let _ = server.kill();
    let _ = server.wait();
    let served = node.scratch.write("served.pem", served.expect("a handshake with the key in the TPM"));
    let blocks = |path: &Path| pem::parse_many(std::fs::read(path).expect("a file")).expect("PEM");
    let leaf =
        |path: &Path| blocks(path).into_iter().find(|block| block.tag() == "CERTIFICATE").expect("a certificate");
    assert_eq!(leaf(&served), leaf(&node.pair()));
}

/// The positive control of `check_no_private_key`: with the file backend, the same search finds the key on disk and
/// in the agent's memory.
#[test]
fn search_finds_the_key_of_the_file_backend() {
    let node = Node::new("file");
    node.configure("file", "", &[]);
    let mut agent = enrol(&node);
    let files = private_keys_in_files(node.scratch.path());
    assert!(files.iter().any(|finding| finding.contains("/state/keys/")), "{files:?}");
    assert!(files.iter().any(|finding| finding.contains("/pki/")), "{files:?}");
    let process = agent.process().id();
    let found = eventually("the key is found in memory", DEADLINE, || {
        let findings = private_keys_in_memory(process, &certified_key(&node.pair())).expect("memory can be read");
        (!findings.is_empty()).then_some(findings)
    });
    println!("{found:#?}");
}
