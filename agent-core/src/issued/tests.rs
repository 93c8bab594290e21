//! What signers may answer, as real certificates.

#![allow(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData as _, SanType, SerialNumber,
};

use super::*;

const NOW: UnixTime = UnixTime::from_seconds(1_800_000_000);
const HOUR: Duration = Duration::from_secs(3600);

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: rcgen::Certificate,
}

fn authority_parameters(name: &str) -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters
}

fn root(name: &str) -> Authority {
    let (parameters, key) = (authority_parameters(name), KeyPair::generate().unwrap());
    let certificate = parameters.self_signed(&key).unwrap();
    Authority { issuer: Issuer::new(parameters, key), certificate }
}

impl Authority {
    fn intermediate(&self, parameters: CertificateParams) -> Authority {
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        Authority { issuer: Issuer::new(parameters, key), certificate }
    }

    fn issue(&self, parameters: &CertificateParams, key: &KeyPair) -> String {
        parameters.signed_by(key, &self.issuer).unwrap().pem()
    }

    fn der(&self) -> Vec<u8> {
        self.certificate.der().to_vec()
    }
}

/// What kube-controller-manager would answer: backdated by five minutes, good for an hour.
fn leaf() -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    parameters.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    parameters.distinguished_name.push(DnType::CommonName, "system:node:worker-1");
    parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    valid(&mut parameters, NOW - Duration::from_secs(300), NOW + HOUR);
    parameters
}

fn valid(leaf: &mut CertificateParams, begin: UnixTime, end: UnixTime) {
    let since_epoch = |at: UnixTime| at.since(UnixTime::from_seconds(0));
    leaf.not_before = rcgen::date_time_ymd(1970, 1, 1) + since_epoch(begin);
    leaf.not_after = rcgen::date_time_ymd(1970, 1, 1) + since_epoch(end);
}

fn key_name() -> KeyName {
    KeyName { backend: "file".to_owned(), id: KeyId::new(*b"worker-1/client/1").unwrap() }
}

fn public_key(key: &KeyPair) -> PublicKey {
    PublicKey::from_der(key.subject_public_key_info()).unwrap()
}

fn template() -> Template {
    Template::kubelet_client("worker-1")
}

/// What comes of this leaf, changed like this.
fn verdict(change: impl FnOnce(&mut CertificateParams)) -> Result<Credential, Rejection> {
    verdict_for(&template(), change)
}

fn verdict_for(template: &Template, change: impl FnOnce(&mut CertificateParams)) -> Result<Credential, Rejection> {
    let (root, key, mut parameters) = (root("root"), KeyPair::generate().unwrap(), leaf());
    change(&mut parameters);
    let chain = root.issue(&parameters, &key);
    accept(&chain, template, key_name(), &public_key(&key), Some(&[root.der()]), NOW)
}

#[test]
fn good_leaf_is_accepted_and_says_what_it_is() {
    let credential = verdict(|leaf| leaf.serial_number = Some(SerialNumber::from(vec![0x8a, 0x0b]))).unwrap();
    assert_eq!((credential.key(), credential.installed_at()), (&key_name(), NOW));
    assert_eq!(credential.serial(), "8A0B", "without the zero octet that DER puts before it");
    assert_eq!(credential.not_before(), NOW - Duration::from_secs(300));
    assert!(credential.has_expired(credential.not_after()) && !credential.has_expired(NOW));
    assert!(credential.subject().contains("system:node:worker-1"));
    assert_eq!(node_name_of(&credential.chain_pem()).as_deref(), Some("worker-1"));
    assert_eq!(public_key_of(&credential.chain_pem()).unwrap().as_der(), credential.public_key());
}

#[test]
fn serial_is_as_openssl_prints_it() {
    let serial = |octets: &[u8]| {
        verdict(|leaf| leaf.serial_number = Some(SerialNumber::from(octets.to_vec()))).unwrap().serial().to_owned()
    };
    assert_eq!((serial(&[1]), serial(&[0x0a, 0]), serial(&[0xff; 3])), ("01".into(), "0A00".into(), "FFFFFF".into()));
}

/// The API server stores what a signer gives it, as long as Go's PEM decoder reads it.
#[test]
fn every_pem_text_that_the_api_server_stores_is_read() {
    let key = KeyPair::generate().unwrap();
    let (root, bad) = (root("root"), pem::encode(&pem::Pem::new("CERTIFICATE", vec![0x30, 0x03, 1, 2, 3])));
    let good = root.issue(&leaf(), &key).replace("\r\n", "\n");
    let authorities = [pem::parse(bad).unwrap().into_contents(), root.der()];
    let mut fingerprints = Vec::new();
    for chain in [
        good.clone(),
        good.replace("\n-----END", "\n\n-----END"),
        good.replace('\n', "\n\n"),
        good.replace('\n', "\r\n"),
        good.replace('\n', " \n"),
        format!("Issued by example.\n{good}"),
        format!("-----BEGIN of the note-----\n{good}"),
        format!("{good}\0\0\0"),
    ] {
        let verdict = accept(&chain, &template(), key_name(), &public_key(&key), Some(&authorities), NOW);
        fingerprints.push(*verdict.unwrap_or_else(|error| panic!("{error}: {chain:?}")).fingerprint());
    }
    assert!(fingerprints.iter().all(|fingerprint| fingerprint == &fingerprints[0]));
}

#[test]
fn unreadable_chains_are_rejected() {
    let key = KeyPair::generate().unwrap();
    let root = root("root");
    let good = root.issue(&leaf(), &key);
    let trailing = pem::encode(&pem::Pem::new("CERTIFICATE", [pem::parse(&good).unwrap().contents(), &[0]].concat()));
    let garbage = pem::encode(&pem::Pem::new("CERTIFICATE", vec![0x30, 0x03, 1, 2, 3]));
    for chain in ["", "no PEM", &"\0".repeat(4096), &key.serialize_pem(), &trailing, &garbage] {
        let verdict = accept(chain, &template(), key_name(), &public_key(&key), None, NOW);
        assert!(matches!(verdict, Err(Rejection::Unreadable(_))), "{verdict:?}");
    }
}

#[test]
fn leaf_for_another_key_is_rejected() {
    let (root, key, other) = (root("root"), KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let chain = root.issue(&leaf(), &other);
    let verdict = accept(&chain, &template(), key_name(), &public_key(&key), Some(&[root.der()]), NOW);
    assert_eq!(verdict, Err(Rejection::OtherKey));
}

#[test]
fn another_subject_is_rejected() {
    let changes: [fn(&mut CertificateParams); 4] = [
        |leaf| leaf.distinguished_name.push(DnType::CommonName, "system:node:worker-2"),
        |leaf| leaf.distinguished_name.push(DnType::OrganizationName, "system:masters"),
        |leaf| leaf.distinguished_name = rcgen::DistinguishedName::new(),
        |leaf| {
            leaf.distinguished_name.remove(DnType::OrganizationName);
        },
    ];
    for change in changes {
        let verdict = verdict(change);
        assert!(matches!(verdict, Err(Rejection::OtherSubject { .. })), "{verdict:?}");
    }
}

/// Case C28: a signer that drops a name.
#[test]
fn missing_names_are_rejected_and_additional_ones_are_not() {
    let mut template = template();
    template.dns_names = vec!["worker-1".to_owned()];
    template.ip_addresses = vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
    let names = || {
        let dns = |name: &str| SanType::DnsName(name.try_into().unwrap());
        let ip = |address: &str| SanType::IpAddress(address.parse().unwrap());
        vec![dns("worker-1"), dns("other"), ip("192.0.2.1"), ip("2001:db8::1")]
    };
    assert!(verdict_for(&template, |leaf| leaf.subject_alt_names = names()).is_ok());
    for dropped in [0, 2, 3] {
        let verdict = verdict_for(&template, |leaf| {
            leaf.subject_alt_names = names();
            leaf.subject_alt_names.remove(dropped);
        });
        assert!(matches!(verdict, Err(Rejection::Missing(_))), "{verdict:?}");
    }
    assert!(matches!(verdict_for(&template, |_| {}), Err(Rejection::Missing(_))));
}

#[test]
fn missing_usages_are_rejected() {
    let key_usage = verdict(|leaf| leaf.key_usages = vec![KeyUsagePurpose::KeyEncipherment]);
    assert_eq!(key_usage, Err(Rejection::Missing("the key usage digitalSignature".to_owned())));
    let extended = verdict(|leaf| leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    assert_eq!(extended, Err(Rejection::Missing("the extended key usage clientAuth".to_owned())));
    assert!(verdict(|leaf| leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any]).is_ok());
    assert!(verdict(|leaf| (leaf.key_usages, leaf.extended_key_usages) = (Vec::new(), Vec::new())).is_ok());
}

/// Case C06.
#[test]
fn validity_begins_inclusively_and_ends_exclusively() {
    let second = Duration::from_secs(1);
    assert!(verdict(|leaf| valid(leaf, NOW, NOW + HOUR)).is_ok());
    assert_eq!(verdict(|leaf| valid(leaf, NOW + second, NOW + HOUR)), Err(Rejection::NotYetValid(NOW + second)));
    assert!(verdict(|leaf| valid(leaf, NOW - HOUR, NOW + second)).is_ok());
    assert_eq!(verdict(|leaf| valid(leaf, NOW - HOUR, NOW)), Err(Rejection::Expired(NOW)));
}

#[test]
fn signature_leads_to_an_authority_directly_or_through_the_chain() {
    let (root_authority, key) = (root("root"), KeyPair::generate().unwrap());
    let first = root_authority.intermediate(authority_parameters("first"));
    let second = first.intermediate(authority_parameters("second"));
    let (leaf_pem, key_name) = (second.issue(&leaf(), &key), key_name());
    let check = |chain: &[&str], authorities: &[Vec<u8>]| {
        accept(&chain.concat(), &template(), key_name.clone(), &public_key(&key), Some(authorities), NOW)
    };
    let (first_pem, second_pem) = (first.certificate.pem(), second.certificate.pem());
    let (root_der, impostor) = (root_authority.der(), root("root").der());
    assert_eq!(check(&[&leaf_pem, &second_pem, &first_pem], std::slice::from_ref(&root_der)).unwrap().chain().len(), 3);
    assert!(check(&[&leaf_pem, &first_pem, &second_pem], &[impostor.clone(), root_der.clone()]).is_ok(), "any order");
    assert!(check(&[&leaf_pem], &[second.der()]).is_ok(), "an intermediate may be the configured authority");
    for (chain, authorities) in [
        (vec![&*leaf_pem, &*second_pem], vec![root_der.clone()]),
        (vec![&*leaf_pem, &*second_pem, &*first_pem], vec![impostor]),
        (vec![&*leaf_pem, &*second_pem, &*first_pem], Vec::new()),
    ] {
        assert!(matches!(check(&chain, &authorities), Err(Rejection::Untrusted(_))));
    }

    let mut no_authority = authority_parameters("second");
    no_authority.is_ca = IsCa::NoCa;
    let no_authority = first.intermediate(no_authority);
    let signed_by_a_leaf = no_authority.issue(&leaf(), &key);
    let chain = [&*signed_by_a_leaf, &*no_authority.certificate.pem(), &*first_pem];
    assert!(matches!(check(&chain, &[root_der]), Err(Rejection::Untrusted(_))), "a leaf signs nothing");
}

#[test]
fn journal_gives_back_the_same_credential_and_nothing_unreadable() {
    let credential = verdict(|_| {}).unwrap().installed(NOW + Duration::from_millis(1234));
    let text = serde_json::to_string(&credential).unwrap();
    assert_eq!(serde_json::from_str::<Credential>(&text).unwrap(), credential);
    assert!(serde_json::from_str::<Credential>(&text.replace("CERTIFICATE", "CERTIFICATES")).is_err());
}

#[test]
fn debug_and_journal_hold_no_private_key_even_if_the_chain_came_with_one() {
    let (root, key) = (root("root"), KeyPair::generate().unwrap());
    let pair = key.serialize_pem() + &root.issue(&leaf(), &key);
    let credential = accept(&pair, &template(), key_name(), &public_key(&key), None, NOW).unwrap();
    assert_eq!(credential.chain().len(), 1);
    let printed = format!("{credential:?} {}", serde_json::to_string(&credential).unwrap());
    let secret = key.serialize_pem();
    for line in secret.lines().filter(|line| line.len() > 20) {
        assert!(!printed.contains(line));
    }
    assert!(!format!("{credential:?}").contains("MII") && !printed.contains("PRIVATE KEY"));
}
