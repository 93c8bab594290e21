//! What reaches the signer.

#![allow(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature as signing;
use aws_lc_rs::signature::KeyPair as _;
use rcgen::PublicKeyData as _;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

use super::*;
use crate::rotation::simulation::public_key;

const ALGORITHMS: [(KeyAlgorithm, &rcgen::SignatureAlgorithm, usize); 6] = [
    (KeyAlgorithm::EcdsaP256, &rcgen::PKCS_ECDSA_P256_SHA256, 0),
    (KeyAlgorithm::EcdsaP384, &rcgen::PKCS_ECDSA_P384_SHA384, 0),
    (KeyAlgorithm::Ed25519, &rcgen::PKCS_ED25519, 0),
    (KeyAlgorithm::Rsa2048, &rcgen::PKCS_RSA_SHA256, 2048),
    (KeyAlgorithm::Rsa3072, &rcgen::PKCS_RSA_SHA256, 3072),
    (KeyAlgorithm::Rsa4096, &rcgen::PKCS_RSA_SHA256, 4096),
];

fn generate(algorithm: &'static rcgen::SignatureAlgorithm, bits: usize) -> rcgen::KeyPair {
    match bits {
        2048 => rcgen::KeyPair::generate_rsa_for(algorithm, rcgen::RsaKeySize::_2048),
        3072 => rcgen::KeyPair::generate_rsa_for(algorithm, rcgen::RsaKeySize::_3072),
        4096 => rcgen::KeyPair::generate_rsa_for(algorithm, rcgen::RsaKeySize::_4096),
        _ => rcgen::KeyPair::generate_for(algorithm),
    }
    .unwrap()
}

/// Case C17.
#[test]
fn request_of_every_algorithm_is_signed_and_says_who_asks() {
    let mut template = Template::kubelet_client("worker-1");
    template.dns_names = vec!["worker-1".to_owned()];
    template.ip_addresses = vec!["192.0.2.1".parse().unwrap()];
    for (algorithm, rcgen_algorithm, bits) in ALGORITHMS {
        let key = generate(rcgen_algorithm, bits);
        let public_key = PublicKey::from_der(key.subject_public_key_info()).unwrap();
        assert_eq!(public_key.algorithm(), algorithm);
        let request = template.certification_request(&public_key, |scheme, message| {
            assert!(algorithm.schemes().contains(&scheme));
            rcgen::SigningKey::sign(&key, message)
        });
        let der = pem::parse(request.unwrap()).unwrap().into_contents();
        let (rest, request) = X509CertificationRequest::from_der(&der).unwrap();
        assert!(rest.is_empty());
        request.verify_signature().unwrap();
        let information = &request.certification_request_info;
        assert_eq!(information.subject.to_string(), "O=system:nodes, CN=system:node:worker-1");
        assert_eq!(information.subject_pki.raw, public_key.as_der());
        let names: Vec<_> = request
            .requested_extensions()
            .into_iter()
            .flatten()
            .filter_map(|extension| match extension {
                ParsedExtension::SubjectAlternativeName(names) => Some(names.general_names.clone()),
                _ => None,
            })
            .flatten()
            .collect();
        assert_eq!(names, [GeneralName::DNSName("worker-1"), GeneralName::IPAddress(&[192, 0, 2, 1])]);
    }
}

#[test]
fn kubelet_client_request_has_no_subject_alternative_name() {
    let key = rcgen::KeyPair::generate().unwrap();
    let public_key = PublicKey::from_der(key.subject_public_key_info()).unwrap();
    let request = Template::kubelet_client("worker-1")
        .certification_request(&public_key, |_, message| rcgen::SigningKey::sign(&key, message));
    let der = pem::parse(request.unwrap()).unwrap().into_contents();
    let (_, request) = X509CertificationRequest::from_der(&der).unwrap();
    assert_eq!(request.requested_extensions().into_iter().flatten().count(), 0);
}

#[test]
fn failure_to_sign_and_impossible_names_are_told_apart() {
    let mut template = Template::kubelet_client("worker-1");
    let locked = template.certification_request(&public_key(1), |_, _| Err("locked"));
    assert_eq!(locked, Err(RequestError::Sign("locked")));
    template.dns_names = vec!["kn\u{f6}t".to_owned()];
    let impossible = template.certification_request(&public_key(1), |_, _| Err("locked"));
    assert!(matches!(impossible, Err(RequestError::Template(_))), "{impossible:?}");
}

/// A PKCS#1 v1.5 signature, as a token makes it.
#[test]
fn rsa_request_verifies_with_a_key_that_rcgen_did_not_make() {
    let key = signing::RsaKeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
    let der = aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::PublicKeyX509Der<'_>>::as_der(key.public_key());
    let public_key = PublicKey::from_der(der.unwrap().as_ref()).unwrap();
    let request = Template::kubelet_client("worker-1").certification_request(&public_key, |scheme, message| {
        assert_eq!(scheme, SignatureScheme::RsaPkcs1Sha256);
        let mut signature = vec![0; key.public_modulus_len()];
        key.sign(&signing::RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature).map(|()| signature)
    });
    let der = pem::parse(request.unwrap()).unwrap().into_contents();
    X509CertificationRequest::from_der(&der).unwrap().1.verify_signature().unwrap();
}

/// Case C16.
#[test]
fn usages_are_exactly_those_of_the_kubelet() {
    let template = Template::kubelet_client("worker-1");
    let with = ["digital signature", "key encipherment", "client auth"];
    let without = ["digital signature", "client auth"];
    for minor in [Some(21), Some(24), Some(26), None] {
        for algorithm in KeyAlgorithm::ALL {
            assert_eq!(template.usages(algorithm, minor), with, "{algorithm} {minor:?}");
        }
    }
    for minor in [Some(27), Some(36)] {
        for algorithm in KeyAlgorithm::ALL {
            let expected = if algorithm.is_rsa() { &with[..] } else { &without[..] };
            assert_eq!(template.usages(algorithm, minor), expected, "{algorithm} {minor:?}");
        }
    }
}

/// Cases C01 and C30.
#[test]
fn request_name_is_a_dns_subdomain_that_only_the_same_request_has() {
    let mut names = std::collections::BTreeSet::new();
    let long = "n".repeat(253);
    let nodes = ["worker-1", "worker-2", "Worker.1", "", "-.-", "a_b", "k\u{f6}ln", &long];
    for node in nodes {
        for signer in [KUBELET_CLIENT_SIGNER, "example.com/other"] {
            let template = Template { signer_name: signer.to_owned(), ..Template::kubelet_client(node) };
            for number in 0..4 {
                for attempt in [1, 2, u32::MAX] {
                    let name = template.request_name(&public_key(number), attempt);
                    assert_eq!(name, template.request_name(&public_key(number), attempt));
                    assert!(is_dns_subdomain(&name), "{name}");
                    assert!(names.insert(name));
                }
            }
        }
    }
    assert_eq!(names.len(), nodes.len() * 2 * 4 * 3);
}

/// RFC 1123, section 2.1, as Kubernetes has it: labels of lower-case letters, digits and inner hyphens.
fn is_dns_subdomain(name: &str) -> bool {
    let alphanumeric = |octet: u8| octet.is_ascii_lowercase() || octet.is_ascii_digit();
    let label = |label: &str| {
        let octets = label.as_bytes();
        octets.first().copied().is_some_and(alphanumeric)
            && octets.last().copied().is_some_and(alphanumeric)
            && octets.iter().all(|octet| alphanumeric(*octet) || *octet == b'-')
    };
    name.len() <= 253 && name.split('.').all(label)
}
