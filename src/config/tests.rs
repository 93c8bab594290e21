use pintle_plugins_api::KeyAlgorithm;

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    let flags = Flags { node_name: Some("worker-1".to_owned()), ..Flags::default() };
    with_flags(flags, text)
}

fn with_flags(flags: Flags, text: &str) -> Result<Config, ConfigError> {
    Config::from_parts(flags, FileConfiguration::parse(text, Path::new("config.toml"))?)
}

#[test]
fn flags_override_the_file_and_defaults_are_the_kubelets() {
    let config = parse("node-name = \"other\"\nkeep-pairs = 3\n").expect("valid");
    let client = config.identity(None).expect("the only one");
    assert_eq!((config.node.name.as_str(), client.keep_pairs), ("worker-1", 3));
    assert_eq!(client.cert_dir, Path::new("/var/lib/kubelet/pki"));
    assert!(client.rotate_certificates && client.owns_kubeconfig);
    let config = parse("[backends.file]\ntype = \"file\"\ndirectory = \"keys\"\n").expect("valid");
    assert!(config.node.file_keys().is_absolute());
}

/// The names of a release that knew a single identity: what it left in the state directory and in devices is found again.
#[test]
fn without_a_table_everything_is_named_as_before_there_were_any() {
    for text in ["", "[[identity]]\nname = \"client\""] {
        let config = parse(text).expect("valid");
        let client = config.identity(Some("client")).expect("there");
        assert_eq!(client.journal(), Path::new("/var/lib/pintle/client.json"));
        assert_eq!(client.cluster_kubeconfig(), Path::new("/var/lib/pintle/cluster.kubeconfig"));
        assert_eq!(client.migration(), Path::new("/var/lib/pintle/migration.json"));
        assert_eq!(client.pairs().current(), Path::new("/var/lib/kubelet/pki/kubelet-client-current.pem"));
        assert_eq!(client.policy("5e1f09ac").key_prefix.key_id(7).as_bytes(), b"worker-1_client_5e1f09ac_7");
    }
    let runtime = parse("[proxy]").expect("valid").identities[0].proxy.clone().expect("a proxy").configuration;
    assert_eq!(runtime.runtime_directory, Path::new("/run/pintle/proxy/client"));
}

const TWO: &str = "
kubeconfig = \"/etc/kubernetes/kubelet.conf\"
bootstrap-kubeconfig = \"/etc/kubernetes/bootstrap.conf\"
[backends.token]
type = \"pkcs11\"
uri = \"pkcs11:token=a?module-path=/a.so\"
[[identity]]
name = \"kubelet\"
kind = \"kubelet-client\"
backend = \"token\"
[identity.proxy]
[[identity]]
name = \"monitoring\"
cert-dir = \"/var/lib/monitoring/pki\"
kubeconfig = \"/var/lib/monitoring/kubeconfig\"
bootstrap-kubeconfig = \"/var/lib/monitoring/bootstrap.conf\"
keep-pairs = 5
";

#[test]
fn each_identity_has_its_own_and_takes_from_the_node_what_it_does_not_name() {
    let config = parse(TWO).expect("valid");
    let [kubelet, monitoring] = config.identities.as_slice() else { panic!("{config:?}") };
    assert_eq!(kubelet.kubeconfig, Path::new("/etc/kubernetes/kubelet.conf"));
    assert_eq!(kubelet.bootstrap_kubeconfig.as_deref(), Some(Path::new("/etc/kubernetes/bootstrap.conf")));
    assert_eq!(monitoring.kubeconfig, Path::new("/var/lib/monitoring/kubeconfig"));
    assert_eq!((kubelet.backend.as_str(), monitoring.backend.as_str()), ("token", "file"));
    assert_eq!((kubelet.keep_pairs, monitoring.keep_pairs), (2, 5));
    assert_eq!(kubelet.journal(), Path::new("/var/lib/pintle/kubelet.json"));
    assert_eq!(monitoring.cluster_kubeconfig(), Path::new("/var/lib/pintle/monitoring.cluster.kubeconfig"));
    assert_eq!(monitoring.policy("5e1f09ac").key_prefix.key_id(1).as_bytes(), b"worker-1_monitoring_5e1f09ac_1");
    let runtime = &kubelet.proxy.as_ref().expect("a proxy").configuration.runtime_directory;
    assert_eq!(runtime, Path::new("/run/pintle/proxy/kubelet"));

    let ambiguous = config.identity(None).expect_err("two");
    assert!(ambiguous.detail.contains("kubelet, monitoring"), "{ambiguous}");
    assert!(config.identity(Some("kublet")).is_err_and(|error| error.detail.contains("kublet")));
}

#[test]
fn the_kubeconfig_of_the_node_is_written_by_one_identity_alone() {
    let one = "[[identity]]\nname = \"one\"\nkubeconfig = \"/one\"\ncert-dir = \"/pki1\"\n";
    let two = "[[identity]]\nname = \"two\"\ncert-dir = \"/pki2\"\n";
    let three = "[[identity]]\nname = \"three\"\ncert-dir = \"/pki3\"\n";
    let config = parse(&format!("{one}{two}{three}")).expect("valid");
    let owns: Vec<_> = config.identities.iter().map(|identity| identity.owns_kubeconfig).collect();
    assert_eq!(owns, [true, true, false]);
}

#[test]
fn a_flag_about_one_identity_needs_to_be_unambiguous() {
    let flags = || Flags { node_name: Some("n".to_owned()), keep_pairs: Some(7), ..Flags::default() };
    let config = with_flags(flags(), "[[identity]]\nname = \"only\"\nkeep-pairs = 3").expect("valid");
    assert_eq!(config.identities[0].keep_pairs, 7);
    let error = with_flags(flags(), TWO).expect_err("which one?");
    assert!(error.detail.contains("--keep-pairs") && error.hint.contains("table"), "{error:?}");
}

#[test]
fn what_identities_would_fight_over_is_refused() {
    let identity = |name: &str, rest: &str| format!("[[identity]]\nname = \"{name}\"\n{rest}\n");
    let two = |one: &str, other: &str| identity("one", one) + &identity("two", other);
    let own = "cert-dir = \"/pki2\"\nkubeconfig = \"/kubeconfig2\"";
    let proxy = "[identity.proxy]\nlisten = \"127.0.0.1:6444\"";
    for (text, words) in [
        (identity("one", "") + &identity("one", own), "named \"one\""),
        (two("", "kubeconfig = \"/k\""), "cert-dir"),
        (two("cert-dir = \"/usr/../pki2\"", own), "cert-dir"),
        (two("kubeconfig = \"/k\"", "cert-dir = \"/pki2\"\nkubeconfig = \"/k\""), "same kubeconfig"),
        (two(proxy, &format!("{own}\n{proxy}")), "proxy.listen"),
        (
            two(
                "[identity.proxy]\nunix-socket = \"/s\"",
                &format!("{own}\n[identity.proxy]\nlisten = \"127.0.0.1:1\"\nunix-socket = \"/s\""),
            ),
            "proxy.unix-socket",
        ),
        (two("[identity.proxy]\nkubeconfig = \"/kubeconfig2\"", own), "proxy.kubeconfig"),
        (
            two(
                "[identity.proxy]\nkubeconfig = \"/p\"",
                &format!("{own}\n[identity.proxy]\nlisten = \"127.0.0.1:1\"\nkubeconfig = \"/p\""),
            ),
            "proxy.kubeconfig",
        ),
    ] {
        let error = parse(&text).expect_err(&text);
        assert!(error.detail.contains(words) && !error.hint.is_empty(), "{text}: {error:?}");
    }
}

#[test]
fn every_key_algorithm_is_spelled_alike_in_the_file_the_flag_and_json() {
    #[derive(clap::Parser)]
    struct CommandLine {
        #[command(flatten)]
        flags: Flags,
    }
    let algorithm_of = |text: &str| parse(text).expect(text).identities[0].key_algorithm;
    for algorithm in KeyAlgorithm::ALL {
        let name = algorithm.to_string();
        assert_eq!(algorithm_of(&format!("key-algorithm = \"{name}\"")), algorithm);
        let flag = format!("--key-algorithm={name}");
        let from_flag = <CommandLine as clap::Parser>::try_parse_from(["pintle", &flag]).expect(&name);
        assert_eq!(from_flag.flags.key_algorithm, Some(algorithm));
        assert_eq!(serde_json::to_value(algorithm).expect(&name), name);
    }
    // As versions before wrote it.
    assert_eq!(algorithm_of("key-algorithm = \"rsa2048\""), KeyAlgorithm::Rsa2048);
}

#[test]
fn one_file_is_not_two_kubeconfigs_whatever_it_is_called() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name);
    std::fs::create_dir(at("real")).expect("made");
    std::os::unix::fs::symlink("real", at("link")).expect("linked");
    let both = |one: PathBuf, other: PathBuf| parse(&format!("kubeconfig = {one:?}\n[proxy]\nkubeconfig = {other:?}"));
    let error = both(at("link/config"), at("link/../real/config")).expect_err("one file");
    assert!(error.detail.contains("one file"), "{error:?}");
    both(at("real/config"), at("real/other")).expect("two files");
}

#[test]
fn modules_are_isolated_unless_told_otherwise_and_secrets_are_not_shown() {
    let config = parse(
        "[backends.token]\ntype = \"pkcs11\"\nuri = \"pkcs11:token=a?module-path=/a.so\"\npin-file = \"/etc/pin\"\n\
         [backends.fast]\ntype = \"tpm\"\nisolation = \"none\"\n\
         [backends.vendor]\ntype = \"plugin\"\nlibrary = \"vendor\"\nconfiguration = { code = \"s3cret\" }\n\
         isolation = { user = \"nobody\", environment = { VENDOR_CONF = \"/etc/vendor\" } }\n",
    )
    .expect("valid");
    let isolation = |name: &str| config.node.backends[name].isolation().cloned();
    assert_eq!(isolation("token"), Some(Isolation::default()));
    assert_eq!(isolation("fast"), Some(Isolation::None));
    assert!(matches!(isolation("vendor"), Some(Isolation::Process(process)) if process.user.is_some()));
    assert_eq!(isolation("file"), None);
    assert!(!format!("{config:?}").contains("s3cret"));
    let error =
        parse("[backends.x]\ntype = \"pkcs11\"\nuri = \"pkcs11:token=a?pin-value=931648\"").expect_err("refused");
    assert!(!format!("{error:?}").contains("931648"));
}

#[test]
fn whatever_is_wrong_is_said_with_what_to_do() {
    for (text, words) in [
        ("keep-pair = 3", "keep-pair"),
        ("keep-pairs = 0", "keep-pairs"),
        ("expiration-seconds = 30", "600"),
        ("backend = \"hsm\"", "hsm"),
        ("key-algorithm = \"dsa\"", "ecdsa-p256"),
        ("[backends.x]\ntype = \"paper\"", "`pkcs11`"),
        ("[backends.x]\ntype = \"pkcs11\"", "uri"),
        ("[backends.x]\ntype = \"tpm\"\nisolation = \"some\"", "isolation is"),
        ("[backends.x]\ntype = \"tpm\"\nisolation = { group = \"tss\" }", "isolation"),
        ("[[identity]]\nkind = \"kubelet-client\"", "name"),
        ("[[identity]]\nname = \"Kubelet\"", "Kubelet"),
        ("[[identity]]\nname = \"an-identity-whose-name-is-too-long\"", "1 to 30"),
        ("[[identity]]\nname = \"migration\"", "taken"),
        ("[[identity]]\nname = \"x\"\nkind = \"kubelet-serving\"", "not supported yet"),
        ("[[identity]]\nname = \"x\"\nkind = \"kubelet\"", "not a kind"),
        ("[[identity]]\nname = \"x\"\nsigner-name = \"example.org/x\"", "not supported yet"),
        ("[[identity]]\nname = \"x\"\nnode-name = \"y\"", "node-name"),
        ("cert-dir = \"/x\"\n[[identity]]\nname = \"x\"", "cert-dir at the top level"),
        ("[[identity]]\nname = \"x\"\n[proxy]", "[proxy] at the top level"),
    ] {
        let error = parse(text).expect_err(text);
        assert!(error.detail.contains(words) && !error.hint.is_empty(), "{text}: {error:?}");
    }
    let several = "[[identity]]\nname = \"x\"\nkeep-pairs = 0\n[[identity]]\nname = \"y\"\ncert-dir = \"/y\"";
    assert!(parse(several).expect_err("wrong").detail.contains("[[identity]] \"x\""));
    assert!(parse("keep-pair = 3").expect_err("a slip").hint.contains("did you mean keep-pairs?"));
}
