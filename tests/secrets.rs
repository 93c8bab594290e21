//! No message and no written file contains content of a file that may hold a secret (case C36): parsers quote the
//! input that they fail on. Runs every command with malformed files of each kind.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pintle_test_support::{Answer, Node, holds_within};

const DEADLINE: Duration = Duration::from_secs(60);
/// A token, PIN or password.
const WORD: &str = "Xk7vQ2mZ9pLw4RtB8nYc3HsJ6dGf1AeU";
/// This many consecutive characters of a secret count as a leak.
const RUN: usize = 16;

/// A certificate and its key (PEM), and everything secret in them.
struct Material {
    certificate: String,
    key: String,
    secret: HashSet<Vec<u8>>,
}

impl Material {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters.distinguished_name.push(rcgen::DnType::OrganizationName, "system:nodes");
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "system:node:torn");
        let certificate = parameters.self_signed(&key).expect("a certificate").pem().replace("\r\n", "\n");
        let key = key.serialize_pem().replace("\r\n", "\n");
        // The private scalar is in bytes 36 to 67 of the PKCS#8 structure; the rest is constant or public.
        let body: String = key.lines().filter(|line| !line.starts_with('-')).collect();
        let mut secret = HashSet::new();
        let mut add = |text: &str| secret.extend(text.as_bytes().windows(RUN).map(<[u8]>::to_vec));
        add(WORD);
        add(&body[48..90]);
        // As inline data: base64 of base64, line by line, at any alignment.
        for line in [&body[48..64], &body[64..90]] {
            for skipped in 0..3 {
                let length = (line.len() - skipped) / 3 * 3;
                add(&STANDARD.encode(&line[skipped..skipped + length]));
            }
        }
        Self { certificate, key, secret }
    }

    fn leak(&self, text: &[u8]) -> Option<String> {
        let found = text.windows(RUN).find(|window| self.secret.contains(*window))?;
        Some(String::from_utf8_lossy(found).into_owned())
    }

    /// The combined file of certificate and key, malformed in typical ways.
    fn torn(&self) -> Vec<(&'static str, String)> {
        let Self { certificate, key, .. } = self;
        let both = |key: String| format!("{certificate}{key}");
        let middle = key.find('\n').expect("lines") + 70;
        vec![
            ("whole", both(key.clone())),
            ("blank-line", both(format!("{}\n\n{}", &key[..middle], &key[middle..]))),
            ("lost-begin-dash", both(key.replacen("-----BEGIN", "----BEGIN", 1))),
            ("lost-end-dash", both(key.replace("KEY-----\n", "KEY----\n"))),
            ("no-end", both(key.split("-----END").next().expect("a key").to_owned())),
            ("truncated", both(key[..middle + 20].to_owned())),
            ("carriage-returns", both(key.clone()).replace('\n', "\r\n")),
            ("garbage", both(format!("{}*?*{}", &key[..middle], &key[middle..]))),
            ("key-first", format!("{}*?*{}{certificate}", &key[..middle], &key[middle..])),
            ("no-pem", key.lines().filter(|line| !line.starts_with('-')).collect()),
        ]
    }
}

/// Runs the agent until its first failed attempt, and then the other commands; returns their results.
fn try_everything(node: &Node) -> Vec<(String, Answer)> {
    let log = node.scratch().join("agent.out");
    let mut agent = Command::new(env!("CARGO_BIN_EXE_pintle"))
        .args(["run", "--once", "--log-format", "json"])
        .args(node.flags())
        .stdin(Stdio::null())
        .stdout(File::create(&log).expect("writable"))
        .stderr(File::options().append(true).open(&log).expect("writable"))
        .spawn()
        .expect("pintle starts");
    let outcome = holds_within(DEADLINE, || {
        let ended = agent.try_wait().expect("it was started").is_some();
        let text = fs::read_to_string(&log).unwrap_or_default();
        (ended || text.contains("\"failed\"") || text.contains("\"holding\"")).then_some(())
    });
    let mut answers = vec![("status of the running agent".to_owned(), node.run(&["status", "-o", "json"]))];
    let _ = agent.kill();
    let _ = agent.wait();
    let text = fs::read_to_string(&log).expect("readable");
    assert!(outcome.is_some(), "the agent reported nothing: {text}");
    answers.push(("run".to_owned(), Answer { code: None, output: text, error: String::new() }));
    for command in [
        &["status"][..],
        &["inspect"],
        &["credential"],
        &["needs-renewal"],
        &["config", "check"],
        &["kubeconfig", "--for", "file"],
        &["kubeconfig", "--for", "exec"],
        &["backend", "check"],
        &["keys", "list"],
    ] {
        let mut answer = node.run(command);
        if command == ["credential"] && answer.code == Some(0) {
            // This command outputs the key on purpose.
            answer.output.clear();
        }
        answers.push((command.join(" "), answer));
    }
    answers
}

/// The files below a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    entries
        .flat_map(|path| match path.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => files(&path),
            Ok(metadata) if metadata.is_file() => vec![path],
            _ => Vec::new(),
        })
        .collect()
}

/// Runs every command on a node whose files `prepare` has written, and searches for secrets.
fn check(material: &Material, what: &str, prepare: impl FnOnce(&Node)) {
    let node = Node::new(env!("CARGO_BIN_EXE_pintle"), "torn");
    prepare(&node);
    let given: HashSet<_> = files(node.scratch().path()).into_iter().collect();
    // A proxy password is needed to use the proxy, so it stays in the cluster entry (case C08).
    let keeps_proxy = what.starts_with("a proxy");
    for (command, answer) in try_everything(&node) {
        if keeps_proxy && command.starts_with("kubeconfig ") && answer.code == Some(0) {
            continue;
        }
        for text in [&answer.output, &answer.error] {
            assert_eq!(material.leak(text.as_bytes()), None, "{what}: {command}: {text}");
        }
    }
    // Input files may be moved aside, and the key backend stores keys.
    let keys = node.state_dir().join("keys");
    let moved = |path: &Path| path.extension().is_some_and(|extension| extension == "unreadable");
    for path in files(node.scratch().path()) {
        let is_kubeconfig = path.file_name().is_some_and(|name| name.to_string_lossy().contains("kubeconfig"));
        if (keeps_proxy && is_kubeconfig) || given.contains(&path) {
            continue;
        }
        if !path.starts_with(&keys) && !moved(&path) {
            let content = fs::read(&path).expect("readable");
            let text = String::from_utf8_lossy(&content).into_owned();
            assert_eq!(material.leak(&content), None, "{what}: written into {}: {text}", path.display());
        }
    }
}

fn write(path: &Path, content: &str) -> PathBuf {
    fs::create_dir_all(path.parent().expect("a directory")).expect("made");
    fs::write(path, content).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).expect("ours");
    path.to_owned()
}

/// A kubeconfig with an API server that does not exist.
fn kubeconfig(cluster: &str, user: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts:\n- name: c\n  context: {{cluster: c, user: u}}\n\
         clusters:\n- name: c\n  cluster:\n    server: https://127.0.0.1:1\n{cluster}users:\n- name: u\n  user:\n{user}"
    )
}

const TOKEN: &str = "    token: abc\n";

#[test]
fn c36_a_malformed_file_of_certificates_and_keys_is_not_quoted() {
    let material = Material::new();
    for (form, torn) in material.torn() {
        let data = STANDARD.encode(&torn);
        check(&material, &format!("{form} as client-ca-file"), |node| {
            let path = write(&node.scratch().join("ca.pem"), &torn);
            let _ = node.scratch().write("config.toml", format!("client-ca-file = {path:?}\n"));
            node.give_bootstrap(kubeconfig("", TOKEN));
        });
        check(&material, &format!("{form} as certificate-authority"), |node| {
            let path = write(&node.scratch().join("ca.pem"), &torn);
            node.give_bootstrap(kubeconfig(&format!("    certificate-authority: {}\n", path.display()), TOKEN));
        });
        check(&material, &format!("{form} as certificate-authority-data"), |node| {
            node.give_bootstrap(kubeconfig(&format!("    certificate-authority-data: {data}\n"), TOKEN));
        });
        check(&material, &format!("{form} as client-certificate and client-key"), |node| {
            let path = write(&node.scratch().join("user.pem"), &torn);
            let path = path.display();
            node.give_bootstrap(kubeconfig("", &format!("    client-certificate: {path}\n    client-key: {path}\n")));
        });
        check(&material, &format!("{form} as client-certificate-data and client-key-data"), |node| {
            let user = format!("    client-certificate-data: {data}\n    client-key-data: {data}\n");
            let _ = node.scratch().write("kubeconfig", kubeconfig("", &user));
            node.give_bootstrap(kubeconfig("", &user));
        });
        check(&material, &format!("{form} as tokenFile"), |node| {
            let path = write(&node.scratch().join("token"), &torn);
            node.give_bootstrap(kubeconfig("", &format!("    tokenFile: {}\n", path.display())));
        });
        check(&material, &format!("{form} as the current pair"), |node| {
            write(&node.cert_dir().join("kubelet-client-2026-11-01-00-00-00.pem"), &torn);
            std::os::unix::fs::symlink("kubelet-client-2026-11-01-00-00-00.pem", node.current_path()).expect("linked");
            let _ = node.scratch().write("kubeconfig", kubeconfig("", TOKEN));
        });
        check(&material, &format!("{form} as a key file"), |node| {
            let keys = node.state_dir().join("keys");
            write(&keys.join("0123456789abcdef.key"), &torn);
            write(&keys.join("0123456789abcdef.pem"), &torn);
            fs::set_permissions(&keys, fs::Permissions::from_mode(0o700)).expect("ours");
            node.give_bootstrap(kubeconfig("", TOKEN));
        });
        check(&material, &format!("{form} as a PIN file"), |node| {
            let path = write(&node.scratch().join("pin"), &torn);
            let token = "type = \"pkcs11\"\nuri = \"pkcs11:token=a\"\nmodule = \"/nonexistent/module.so\"";
            let _ = node.scratch().write("config.toml", format!("[backends.t]\n{token}\npin-file = {path:?}\n"));
            node.give_bootstrap(kubeconfig("", TOKEN));
        });
        check(&material, &format!("{form} as the journal"), |node| {
            write(&node.journal(), &torn);
            node.give_bootstrap(kubeconfig("", TOKEN));
        });
    }
}

#[test]
fn c36_a_malformed_kubeconfig_is_not_quoted() {
    let material = Material::new();
    let exec = |script: &str| {
        format!(
            "    exec: {{apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: sh, \
             env: [{{name: SECRET, value: {WORD}}}], args: [-c, '{script}', '{WORD}']}}\n"
        )
    };
    let status = |status: &str| {
        let credential = format!(
            r#"{{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{{{status}}}}}"#
        );
        exec(&format!("cat <<E\n\n      {credential}\n\n      E"))
    };
    let key = material.key.replace('\n', "\\\\n");
    for (what, text) in [
        ("a token with a line break", kubeconfig("", &format!("    token: \"{WORD}\\n{WORD}\"\n"))),
        ("a token of two lines", kubeconfig("", &format!("    token: |\n      {WORD}\n      {WORD}\n"))),
        ("a list as the token", kubeconfig("", &format!("    token: [{WORD}]\n"))),
        ("a mapping as the token", kubeconfig("", &format!("    token: {{{WORD}: {WORD}}}\n"))),
        ("a tab", kubeconfig("", &format!("    token: {WORD}\n\tx: {WORD}\n"))),
        ("an open bracket", kubeconfig("", &format!("    token: [{WORD}\n"))),
        ("an open quote", kubeconfig("", &format!("    token: \"{WORD}\n"))),
        ("an unknown anchor", kubeconfig("", &format!("    token: *{WORD}\n"))),
        ("an unknown tag", kubeconfig("", &format!("    token: !{WORD} {WORD}\n"))),
        ("no base64", kubeconfig("", &format!("    client-certificate-data: eA==\n    client-key-data: '{WORD}*'\n"))),
        ("a token twice", kubeconfig("", &format!("    token: {WORD}\n    token: [{WORD}]\n"))),
        ("a proxy of another kind", kubeconfig(&format!("    proxy-url: ftp://u:{WORD}@127.0.0.1\n"), TOKEN)),
        ("a proxy that is no URL", kubeconfig(&format!("    proxy-url: 'http://u:{WORD} @127.0.0.1'\n"), TOKEN)),
        ("a proxy that is away", kubeconfig(&format!("    proxy-url: http://u:{WORD}@127.0.0.1:1\n"), TOKEN)),
        (
            "a user in the server's URL",
            kubeconfig("", TOKEN).replace("https://127", &format!("https://user:{WORD}@127")),
        ),
        (
            "a wrong port after it",
            kubeconfig("", TOKEN).replace("https://127.0.0.1:1", &format!("https://user:{WORD}@127.0.0.1:99999")),
        ),
        ("a plugin that fails", kubeconfig("", &exec(&format!("echo {WORD}; echo {WORD} >&2; exit 3")))),
        ("a plugin that prints no JSON", kubeconfig("", &exec(&format!("echo {WORD}")))),
        ("a plugin's number", kubeconfig("", &status(&format!("\"token\": [\"{WORD}\"]")))),
        ("a plugin's time", kubeconfig("", &status(&format!("\"token\":\"x\",\"expirationTimestamp\":\"{WORD}\"")))),
        (
            "a plugin's certificate",
            kubeconfig("", &status(&format!("\"clientCertificateData\":\"{WORD}\",\"clientKeyData\":\"{key}\""))),
        ),
    ] {
        for both in [false, true] {
            check(&material, what, |node| {
                node.give_bootstrap(&text);
                if both {
                    let _ = node.scratch().write("kubeconfig", &text);
                }
            });
        }
    }
}

#[test]
fn c36_a_malformed_configuration_file_is_not_quoted() {
    let material = Material::new();
    let token = "[backends.t]\ntype = \"pkcs11\"\nmodule = \"/nonexistent/module.so\"\n";
    for (what, text) in [
        ("a value of another type", format!("keep-pairs = \"{WORD}\"\n")),
        ("an unknown word", format!("on-key-loss = \"{WORD}\"\n")),
        ("an unknown algorithm", format!("key-algorithm = \"{WORD}\"\n")),
        ("an unknown key", format!("{WORD} = 1\n")),
        ("an unknown key's value", format!("pin = \"{WORD}\"\n")),
        ("no key", format!("{WORD}\n")),
        ("a bare value", format!("node-name = {WORD}\n")),
        ("an open quote", format!("node-name = \"{WORD}\n")),
        ("a key twice", format!("{WORD} = 1\n{WORD} = 2\n")),
        ("an address", format!("metrics-address = \"{WORD}\"\n")),
        ("a PIN in a URI", format!("{token}uri = \"pkcs11:token=a?pin-value={WORD}\"\n")),
        ("an unknown attribute of a URI", format!("{token}uri = \"pkcs11:token=a;{WORD}=b\"\n")),
        ("an unknown key of a backend", format!("{token}uri = \"pkcs11:token=a\"\n{WORD} = \"{WORD}\"\n")),
        ("a PIN", format!("{token}uri = \"pkcs11:token=a\"\npin = \"{WORD}\"\n")),
        ("an isolation", format!("{token}uri = \"pkcs11:token=a\"\nisolation = \"{WORD}\"\n")),
        (
            "a plugin's configuration",
            format!(
                "[backends.p]\ntype = \"plugin\"\nlibrary = \"/nonexistent.so\"\nconfiguration = {{ pin = \"{WORD}\" }}\n"
            ),
        ),
        (
            "a plugin's configuration that is none",
            format!("[backends.p]\ntype = \"plugin\"\nlibrary = \"/nonexistent.so\"\nconfiguration = \"{WORD}\"\n"),
        ),
        ("a key", material.key.clone()),
    ] {
        check(&material, what, |node| {
            let _ = node.scratch().write("config.toml", &text);
            node.give_bootstrap(kubeconfig("", TOKEN));
        });
    }
    for (what, text) in [
        ("a journal's version", format!("{{\"version\": \"{WORD}\"}}")),
        ("a journal's field", format!("{{\"version\": 1, \"identity\": \"a\", \"state\": {{\"phase\": \"{WORD}\"}}}}")),
        ("a journal's unknown field", format!("{{\"{WORD}\": 1, \"version\": []}}")),
    ] {
        check(&material, what, |node| {
            write(&node.journal(), &text);
            write(&node.state_dir().join("migration.json"), &text);
            node.give_bootstrap(kubeconfig("", TOKEN));
        });
    }
}

/// The search finds a leak.
#[test]
fn a_leak_would_be_found() {
    let material = Material::new();
    assert_eq!(material.leak(format!("error: {}", &WORD[4..4 + RUN]).as_bytes()).as_deref(), Some(&WORD[4..4 + RUN]));
    assert!(material.leak(material.key.as_bytes()).is_some());
    assert!(material.leak(STANDARD.encode(&material.key).as_bytes()).is_some());
    assert!(material.leak(material.certificate.as_bytes()).is_none());
}
