//! Kubeconfigs, as they are read and written.

use super::*;
use crate::world::SystemFiles;

const BOOTSTRAP: &str = "
apiVersion: v1
kind: Config
current-context: b
clusters:
- name: c
  cluster: {server: 'https://10.0.0.1:6443', certificate-authority: ca.crt, proxy-url: 'http://p:3128', tls-server-name: api}
contexts:
- name: b
  context: {cluster: c, user: u}
users:
- name: u
  user: {token: abcdef.0123456789abcdef}
";

const EXISTING: &str = "
apiVersion: v1
kind: Config
current-context: mine
clusters:
- name: other
  cluster: {server: 'https://other'}
- name: c
  cluster: {server: 'https://10.0.0.1/k8s/clusters/c-1', certificate-authority-data: eA==, proxy-url: 'http://p', extensions: [{name: e, extension: {a: b}}]}
contexts:
- name: mine
  context: {cluster: c, user: u, namespace: here}
users:
- name: u
  user: {client-certificate-data: eA==, client-key-data: eA==}
- name: v
  user: {token: secret}
";

fn pair() -> &'static Path {
    Path::new("/pki/current.pem")
}

#[test]
fn c08_the_cluster_is_kept_whole_and_the_token_is_not() {
    let directory = tempfile::tempdir().expect("a directory");
    let (bootstrap, path) = (directory.path().join("bootstrap"), directory.path().join("etc/kubeconfig"));
    std::fs::write(&bootstrap, BOOTSTRAP).expect("written");
    let mut kubeconfig = Kubeconfig::for_cluster_of(&SystemFiles, &bootstrap).expect("a kubeconfig");
    kubeconfig.use_files(pair(), pair()).expect("text");
    assert!(kubeconfig.write(&SystemFiles, &path, None).expect("written"));
    let text = std::fs::read_to_string(&path).expect("readable");
    for kept in ["http://p:3128", "tls-server-name: api", "client-key: /pki/current.pem"] {
        assert!(text.contains(kept), "{kept} in {text}");
    }
    assert!(text.contains(&directory.path().join("ca.crt").display().to_string()));
    assert!(!text.contains("abcdef"));
    assert_eq!(staleness(&SystemFiles, &path, pair()), None);
    assert!(staleness(&SystemFiles, &path, Path::new("/other.pem")).is_some());

    // Kept apart, and taken from there when the bootstrap kubeconfig is gone (case C23).
    let kept = directory.path().join("state/cluster.kubeconfig");
    Kubeconfig::for_cluster_of(&SystemFiles, &bootstrap)
        .expect("a kubeconfig")
        .write(&SystemFiles, &kept, None)
        .expect("written");
    assert!(!std::fs::read_to_string(&kept).expect("readable").contains("abcdef"));
    let mut again = Kubeconfig::for_cluster_of(&SystemFiles, &kept).expect("a kubeconfig");
    again.use_files(pair(), pair()).expect("text");
    assert_eq!(again, kubeconfig);
    assert!(!again.write(&SystemFiles, &path, None).expect("the same"));
}

#[test]
fn c08_an_inline_certificate_is_noticed_and_mended() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("kubeconfig");
    std::fs::write(&path, EXISTING).expect("written");
    assert!(staleness(&SystemFiles, &path, pair()).is_some_and(|reason| reason.contains("itself")));
    let mut kubeconfig = Kubeconfig::read_or_new(&SystemFiles, &path).expect("a kubeconfig");
    kubeconfig.use_files(pair(), pair()).expect("text");
    assert!(kubeconfig.write(&SystemFiles, &path, None).expect("written"));
    assert_eq!(staleness(&SystemFiles, &path, pair()), None);
    assert!(staleness(&SystemFiles, directory.path(), pair()).is_some());
    std::fs::write(&path, "").expect("torn");
    assert!(staleness(&SystemFiles, &path, pair()).is_some());
}

#[test]
fn c08_what_is_not_ours_is_kept() {
    let mut kubeconfig = Kubeconfig::parse(EXISTING).expect("a kubeconfig");
    let files = ClientFiles::in_directory(Path::new("/run/x"));
    kubeconfig.use_proxy(LocalServer { address: ([127, 0, 0, 1], 6444).into(), files: &files }, None).expect("text");
    let text = kubeconfig.to_yaml().expect("YAML");
    for kept in ["https://127.0.0.1:6444/k8s/clusters/c-1", "https://other", "namespace: here", "a: b", "secret"] {
        assert!(text.contains(kept), "{kept} in {text}");
    }
    for gone in ["-data", "proxy-url"] {
        assert!(!text.contains(gone), "{gone} in {text}");
    }
    assert!(text.contains("/run/x/client.key"));
    assert_eq!(Kubeconfig::parse(&text).expect("a kubeconfig"), kubeconfig);
    assert!(!format!("{kubeconfig:?}").contains("secret"));

    assert!(kubeconfig.is_of_proxy(&files));
    kubeconfig.use_cluster(Kubeconfig::parse(BOOTSTRAP).expect("a kubeconfig"));
    let text = kubeconfig.to_yaml().expect("YAML");
    assert!(text.contains("https://10.0.0.1:6443") && text.contains("a: b") && !text.contains("127.0.0.1"), "{text}");
    assert!(!kubeconfig.is_of_proxy(&files));
}

#[test]
fn c08_numbers_are_what_go_reads() {
    let text = EXISTING.replace("a: b", "octal: 010, decimal: 10, text: '010'");
    let text = Kubeconfig::parse(&text).and_then(|kubeconfig| kubeconfig.to_yaml()).expect("YAML");
    for kept in ["octal: 8\n", "decimal: 10\n"] {
        assert!(text.contains(kept), "{kept} in {text}");
    }
    assert!(text.contains("text: '010'") || text.contains("text: \"010\""), "{text}");
}

#[test]
fn a_new_one_is_whole_and_one_without_its_context_is_none() {
    let mut kubeconfig = Kubeconfig::new();
    kubeconfig.use_exec("/usr/bin/pintle", &["credential".to_owned()]);
    let text = kubeconfig.to_yaml().expect("YAML");
    assert!(text.contains("current-context: default-context") && text.contains("interactiveMode: Never"), "{text}");
    for wrong in ["current-context: x", "[]", ": {", "current-context: mine\ncontexts: [{name: mine, context: {}}]"] {
        assert!(Kubeconfig::parse(wrong).is_err(), "{wrong}");
    }
}

/// Other YAML parsers read what is written here: Go's take the words and numbers of YAML 1.1 for what they were there.
#[test]
fn what_might_be_no_text_elsewhere_is_quoted() {
    for word in ["yes", "on", "n", "null", "~", "0123", "0x1F", "1_000", "12:30:45", "1e3", "1.5", "", "- a", "a: b"] {
        let mut kubeconfig = Kubeconfig::new();
        kubeconfig.use_exec(word, &[]);
        let text = kubeconfig.to_yaml().expect("YAML");
        let line = text.lines().find(|line| line.trim_start().starts_with("command:")).expect("a line");
        assert!(line.contains(['\'', '"']), "{line}");
    }
}
