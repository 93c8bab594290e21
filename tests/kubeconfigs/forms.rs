//! Formats of kubeconfigs, and of the certificates of API servers and clients.

use std::collections::BTreeMap;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pintle_test_support::ScratchDirectory;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::embedded::Embedded;
use crate::{kubectl_takes, pintle_takes, server};

/// Kubeconfigs that kubectl accepts and pintle rejects on purpose, as documented in docs/operators.md.
const REFUSED: [(&str, &str); 2] = [
    ("too-long", "root reads it repeatedly, so its size is limited"),
    ("pem-authority-signed", "webpki rejects a server certificate with CA:TRUE, unless it is itself a trusted CA"),
];

/// Kubeconfigs that kubectl rejects and pintle accepts.
const TAKEN: [(&str, &str); 6] = [
    ("name-twice", "the first of two entries is used, where kubectl rejects the whole file"),
    ("json-escapes", "JSON has the escape \\/, which only Go's YAML parser does not support"),
    ("authority-both", "inline data takes precedence, so the file need not exist"),
    ("no-user", "kubectl asks for a name and a password at the terminal"),
    ("missing-user", "kubectl asks for a name and a password at the terminal"),
    ("no-token", "kubectl asks for a name and a password at the terminal"),
];

/// Compares kubectl's and pintle's results for these kubeconfigs.
fn compare(forms: Vec<(&str, Vec<u8>)>) {
    let scratch = ScratchDirectory::new();
    let (mut differences, mut taken) = (Vec::new(), 0);
    for (name, content) in forms {
        let path = scratch.write(name, content);
        let (kubectl, pintle) = (kubectl_takes(&path), pintle_takes(&path));
        taken += usize::from(kubectl.is_ok());
        let known = |list: &[(&str, &str)]| list.iter().any(|(known, _)| *known == name);
        let as_it_should_be = match (&kubectl, &pintle) {
            (Ok(()), Ok(())) | (Err(_), Err(_)) => !known(&REFUSED) && !known(&TAKEN),
            (Ok(()), Err(_)) => known(&REFUSED),
            (Err(_), Ok(())) => known(&TAKEN),
        };
        if !as_it_should_be {
            differences.push(format!("{name}: kubectl {kubectl:?}, pintle {pintle:?}"));
        }
    }
    assert!(taken > 0, "kubectl accepts some of them");
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// A plain kubeconfig, and its parts.
struct Plain {
    server: String,
    data: String,
    token: String,
}

impl Plain {
    fn of(control_plane: &Embedded) -> Self {
        let text = control_plane.bootstrap_kubeconfig();
        let value = |key: &str| {
            let line = text.lines().find_map(|line| line.trim().strip_prefix(key)).expect("it is there");
            line.trim().trim_matches('"').to_owned()
        };
        Self { server: value("server:"), data: value("certificate-authority-data:"), token: value("token:") }
    }

    fn text(&self) -> String {
        let Self { server, data, token } = self;
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: b\nclusters:\n- name: c\n  cluster:\n    server: {server}\n    \
             certificate-authority-data: {data}\ncontexts:\n- name: b\n  context:\n    cluster: c\n    user: u\nusers:\n\
             - name: u\n  user:\n    token: {token}\n"
        )
    }
}

fn lines(text: &str, width: usize) -> Vec<&str> {
    let mut rest = text;
    let mut lines = Vec::new();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(width.min(rest.len()));
        lines.push(line);
        rest = after;
    }
    lines
}

#[test]
fn c41_every_format_that_kubectl_reads_is_read() {
    let control_plane = Embedded::signing_for(3600);
    let plain = Plain::of(&control_plane);
    let (base, Plain { server, data, token }) = (plain.text(), &plain);
    let with_data = |data: String| base.replace(&format!("certificate-authority-data: {}\n", plain.data), &data);
    let indented =
        |data: &str, width| -> String { lines(data, width).iter().map(|it| format!("      {it}\n")).collect() };
    let json = serde_json::json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "b",
        "clusters": [{ "name": "c", "cluster": { "server": server, "certificate-authority-data": data } }],
        "contexts": [{ "name": "b", "context": { "cluster": "c", "user": "u" } }],
        "users": [{ "name": "u", "user": { "token": token } }],
    });
    let utf16 = |unit: fn(u16) -> [u8; 2], mark: [u8; 2]| -> Vec<u8> {
        mark.into_iter().chain(base.encode_utf16().flat_map(unit)).collect()
    };
    let with_user = |user: String| base.replace(&format!("    token: {token}\n"), &user);
    let files = ScratchDirectory::new();
    let token_file = files.write("token", format!("  {token}\r\n\n"));
    let other_file = files.write("other-token", "nobody's\n");
    let empty_file = files.write("empty", "");
    let authority = files.write("ca.crt", STANDARD.decode(data).expect("base64"));
    let authority_file = |path: &str| with_data(format!("certificate-authority: {path}\n"));
    let text: Vec<(&str, String)> = vec![
        ("plain", base.clone()),
        ("crlf", base.replace('\n', "\r\n")),
        ("json", json.to_string()),
        ("json-tabs", serde_json::to_string_pretty(&json).expect("JSON").replace("  ", "\t")),
        ("json-escapes", json.to_string().replace('/', "\\/")),
        ("anchor", format!("x: &ca {data}\n{}", with_data("certificate-authority-data: *ca\n".to_owned()))),
        (
            "merge",
            format!("x: &d\n  server: {server}\n  certificate-authority-data: {data}\n{}", with_data(String::new()))
                .replace(&format!("  cluster:\n    server: {server}\n    "), "  cluster:\n    <<: *d\n"),
        ),
        ("doc-start", format!("---\n{base}")),
        ("doc-end", format!("{base}...\n")),
        ("two-docs", format!("{base}---\n")),
        ("other-doc", format!("{base}---\napiVersion: v1\nkind: Secret\n")),
        ("broken-doc", format!("{base}---\n: : [\n")),
        ("directive", format!("%YAML 1.1\n---\n{base}")),
        ("key-twice", base.replace("kind: Config\n", "kind: Config\nkind: Config\n")),
        ("token-twice", with_user(format!("    token: nobodys\n    token: {token}\n"))),
        ("token-twice-wrong", with_user(format!("    token: {token}\n    token: nobodys\n"))),
        ("comment", format!("# made by example\n{}", base.replace("clusters:", "clusters: # ours"))),
        ("tab-trailing", base.replace("kind: Config\n", "kind: Config\t\n")),
        ("null-extras", format!("{base}preferences: null\nextensions: null\n")),
        (
            "unknown-fields",
            base.replace("    server:", "    disable-compression: true\n    new: {a: [1]}\n    server:"),
        ),
        ("no-user", base.replace("    user: u\n", "    user: \"\"\n")),
        ("missing-user", base.replace("    user: u\n", "    user: v\n")),
        ("no-current", base.replace("current-context: b\n", "")),
        ("empty-current", base.replace("current-context: b\n", "current-context: \"\"\n")),
        ("other-current", base.replace("current-context: b\n", "current-context: x\n")),
        ("numbers", base.replace("name: c\n", "name: 0123\n").replace("cluster: c\n", "cluster: 0123\n")),
        ("name-twice", base.replace("contexts:", &format!("- name: c\n  cluster: {{server: '{server}'}}\ncontexts:"))),
        ("empty", String::new()),
        ("blank", "\n\n".to_owned()),
        ("html", "<html><body>404</body></html>\n".to_owned()),
        ("list", "[]\n".to_owned()),
        ("literal", with_data(format!("certificate-authority-data: |\n{}", indented(data, 64)))),
        ("folded", with_data(format!("certificate-authority-data: >\n{}", indented(data, 64)))),
        ("literal-strip", with_data(format!("certificate-authority-data: |-\n{}", indented(data, 76)))),
        ("plain-multiline", with_data(format!("certificate-authority-data: {}\n", lines(data, 64).join("\n      ")))),
        ("escaped", with_data(format!("certificate-authority-data: \"{}\"\n", lines(data, 64).join("\\\n      ")))),
        ("one-line-literal", with_data(format!("certificate-authority-data: |\n      {data}\n"))),
        (
            "binary",
            with_data(format!("certificate-authority-data: !!binary |\n{}", indented(&STANDARD.encode(data), 76))),
        ),
        (
            "binary-of-lines",
            with_data(format!(
                "certificate-authority-data: !!binary |\n{}",
                indented(&STANDARD.encode(lines(data, 60).join("\n")), 76)
            )),
        ),
        ("no-padding", with_data(format!("certificate-authority-data: {}\n", data.trim_end_matches('=')))),
        ("empty-data", with_data("certificate-authority-data: \"\"\n".to_owned())),
        ("no-authority", with_data(String::new())),
        ("no-pem", with_data("certificate-authority-data: eA==\n".to_owned())),
        ("authority-file", authority_file(&authority.display().to_string())),
        ("authority-missing", authority_file("missing.crt")),
        (
            "authority-both",
            with_data(format!("certificate-authority-data: {data}\n    certificate-authority: missing.crt\n")),
        ),
        ("insecure", with_data("insecure-skip-tls-verify: true\n".to_owned())),
        ("insecure-and-authority", base.replace("    server:", "    insecure-skip-tls-verify: true\n    server:")),
        ("token-file", with_user(format!("    tokenFile: {}\n", token_file.display()))),
        ("token-file-missing", with_user("    tokenFile: missing\n".to_owned())),
        ("token-file-empty", with_user(format!("    tokenFile: {}\n", empty_file.display()))),
        ("token-and-file", with_user(format!("    token: {token}\n    tokenFile: {}\n", token_file.display()))),
        ("other-token-and-file", with_user(format!("    token: nobodys\n    tokenFile: {}\n", token_file.display()))),
        ("token-and-other-file", with_user(format!("    token: {token}\n    tokenFile: {}\n", other_file.display()))),
        ("token-and-missing-file", with_user(format!("    token: {token}\n    tokenFile: missing\n"))),
        ("token-with-line-break", with_user(format!("    token: \"{token}\\n\"\n"))),
        ("token-of-two-lines", with_user(format!("    token: |\n      {token}\n      {token}\n"))),
        ("token-number", with_user("    token: 12345\n".to_owned())),
        ("no-token", with_user("    token: \"\"\n".to_owned())),
        ("server-slash", base.replace(server, &format!("{server}/"))),
        ("server-without-scheme", base.replace(server, server.trim_start_matches("https://"))),
        ("server-upper-case", base.replace("https://", "HTTPS://")),
        ("server-http", base.replace("https://", "http://")),
        ("server-space", base.replace(server, &format!("'{server} '"))),
        ("server-empty", base.replace(server, "''")),
        ("server-port", base.replace(server, "https://127.0.0.1:66000")),
        ("server-prefix", base.replace(server, &format!("{server}/k8s/clusters/c-1"))),
        ("server-other-name", base.replace("    server:", "    tls-server-name: other.example\n    server:")),
        ("server-name", base.replace("    server:", "    tls-server-name: localhost\n    server:")),
        ("too-long", format!("{base}x: {}\n", "a".repeat(1 << 20))),
    ];
    let mut forms: Vec<(&str, Vec<u8>)> = text.into_iter().map(|(name, text)| (name, text.into_bytes())).collect();
    forms.push(("bom", [b"\xef\xbb\xbf", base.as_bytes()].concat()));
    forms.push(("utf16-le", utf16(u16::to_le_bytes, [0xff, 0xfe])));
    forms.push(("utf16-be", utf16(u16::to_be_bytes, [0xfe, 0xff])));
    forms.push(("latin-1", [b"# M\xfcller\n", base.as_bytes()].concat()));
    compare(forms);
}

struct Server {
    certificate: rcgen::Certificate,
    key: KeyPair,
}

impl Server {
    fn self_signed(change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().expect("a key");
        Self { certificate: parameters(change).self_signed(&key).expect("a certificate"), key }
    }

    fn signed_by(issuer: &Issuer<'_, KeyPair>, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let key = KeyPair::generate().expect("a key");
        Self { certificate: parameters(change).signed_by(&key, issuer).expect("a certificate"), key }
    }

    fn start(&self) -> std::net::SocketAddr {
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(self.key.serialize_der()));
        server::start(vec![CertificateDer::from(self.certificate.der().to_vec())], key)
    }
}

fn parameters(change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut parameters = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).expect("names");
    change(&mut parameters);
    parameters
}

fn authority(parameters: &mut CertificateParams) {
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.distinguished_name.push(rcgen::DnType::CommonName, "an authority");
}

fn kubeconfig(server: std::net::SocketAddr, authorities: &str, more: &str, user: &str) -> Vec<u8> {
    let data = STANDARD.encode(authorities);
    format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: b\nclusters:\n- name: c\n  cluster:\n    server: https://{server}\n    \
         certificate-authority-data: {data}\n{more}contexts:\n- name: b\n  context: {{cluster: c, user: u}}\nusers:\n\
         - name: u\n  user: {user}\n"
    )
    .into_bytes()
}

#[test]
fn c42_servers_that_kubectl_trusts_are_trusted() {
    let key = KeyPair::generate().expect("a key");
    let root = parameters(authority).self_signed(&key).expect("a certificate").pem();
    let issuer = Issuer::new(parameters(authority), key);
    let other = Server::self_signed(authority).certificate.pem();
    let bad = "-----BEGIN CERTIFICATE-----\nMAAA\n-----END CERTIFICATE-----\n";
    let servers = BTreeMap::from([
        ("signed", Server::signed_by(&issuer, |_| {})),
        ("self", Server::self_signed(|_| {})),
        ("self-authority", Server::self_signed(authority)),
        ("authority-signed", Server::signed_by(&issuer, authority)),
        ("client", Server::self_signed(|it| it.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth])),
        ("expired", Server::self_signed(|it| it.not_after = rcgen::date_time_ymd(2001, 1, 1))),
        ("later", Server::self_signed(|it| it.not_before = rcgen::date_time_ymd(2900, 1, 1))),
        (
            "other-name",
            Server::self_signed(|it| {
                it.subject_alt_names = vec![rcgen::SanType::DnsName("other.example".try_into().expect("a name"))];
            }),
        ),
    ]);
    let addresses: BTreeMap<_, _> = servers.iter().map(|(name, server)| (*name, server.start())).collect();
    let mut forms = Vec::new();
    for (form, name, authorities) in [
        ("pem-root", "signed", root.clone()),
        ("pem-other-root", "signed", other.clone()),
        ("pem-bad-first", "signed", format!("{bad}{root}")),
        ("pem-bad-last", "signed", format!("{root}{bad}")),
        ("pem-bad-alone", "signed", bad.to_owned()),
        ("pem-blank-lines", "signed", root.replace('\n', "\n\n")),
        ("pem-text", "signed", format!("subject=an authority\n{root}the end")),
        ("pem-torn-first", "signed", format!("{}{root}", root.replacen("-----END", "----END", 1))),
        ("pem-torn-alone", "signed", root.replacen("-----END", "----END", 1)),
        ("pem-with-key", "signed", format!("{}{root}", servers["self"].key.serialize_pem())),
        ("pem-leaf", "signed", servers["signed"].certificate.pem()),
        ("pem-self", "self", servers["self"].certificate.pem()),
        ("pem-self-authority", "self-authority", servers["self-authority"].certificate.pem()),
        ("pem-self-by-root", "self-authority", root.clone()),
        ("pem-authority-leaf", "authority-signed", servers["authority-signed"].certificate.pem()),
        ("pem-authority-signed", "authority-signed", root.clone()),
        ("pem-client", "client", servers["client"].certificate.pem()),
        ("pem-expired", "expired", servers["expired"].certificate.pem()),
        ("pem-later", "later", servers["later"].certificate.pem()),
        ("pem-other-name", "other-name", servers["other-name"].certificate.pem()),
    ] {
        forms.push((form, kubeconfig(addresses[name], &authorities, "", "{token: x}")));
    }
    let name = "    tls-server-name: other.example\n";
    let pem = servers["other-name"].certificate.pem();
    forms.push(("pem-other-name-meant", kubeconfig(addresses["other-name"], &pem, name, "{token: x}")));
    compare(forms);
}

#[test]
fn c42_x509_v1_client_certificates_and_keys_of_every_format_are_accepted() {
    let server = Server::self_signed(|_| {});
    let (address, root) = (server.start(), server.certificate.pem());
    let files = ScratchDirectory::new();
    let openssl = |arguments: &[&str]| {
        let output =
            Command::new("openssl").args(arguments).current_dir(files.path()).output().expect("openssl starts");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", "sec1.key"]);
    openssl(&["genrsa", "-traditional", "-out", "pkcs1.key", "2048"]);
    openssl(&["ecparam", "-name", "prime256v1", "-genkey", "-out", "parameters.key"]);
    let mut forms = Vec::new();
    let read = |name: &str| std::fs::read_to_string(files.join(name)).expect("readable");
    for key in ["sec1", "pkcs1", "parameters"] {
        let (key_file, request, certificate) = (format!("{key}.key"), format!("{key}.csr"), format!("{key}.crt"));
        openssl(&["req", "-new", "-key", &key_file, "-subj", "/O=system:nodes/CN=system:node:a", "-out", &request]);
        // Without extensions, so an X.509 v1 certificate.
        openssl(&["x509", "-req", "-in", &request, "-signkey", &key_file, "-out", &certificate]);
        let user = |certificate: &str, key: &str| {
            let (certificate, key) = (STANDARD.encode(certificate), STANDARD.encode(key));
            kubeconfig(
                address,
                &root,
                "",
                &format!("{{client-certificate-data: {certificate}, client-key-data: {key}}}"),
            )
        };
        let (certificate, key_text) = (read(&certificate), read(&key_file));
        let (_, parsed) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).expect("PEM");
        assert_eq!(parsed.parse_x509().expect("a certificate").version, x509_parser::x509::X509Version::V1);
        let name = |form: &str| -> &'static str { Box::leak(format!("{key}-{form}").into_boxed_str()) };
        forms.push((name("v1"), user(&certificate, &key_text)));
        forms.push((name("blank-lines"), user(&certificate.replace('\n', "\n\n"), &key_text.replace('\n', "\n\n"))));
        forms.push((name("other-key"), user(&certificate, &server.key.serialize_pem())));
        forms.push((name("no-key"), user(&certificate, "")));
        forms.push((name("torn-key"), user(&certificate, &key_text.replace("-----END", "----END"))));
        let both = format!("{key_text}{certificate}");
        forms.push((name("combined"), user(&both, &both)));
    }
    compare(forms);
}
