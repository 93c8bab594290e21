//! Whether a certificate is the one that was asked for.

use std::net::IpAddr;

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

use super::{Rejection, parse};
use crate::Template;

pub(super) fn check_subject(leaf: &X509Certificate<'_>, requested: &Template) -> Result<(), Rejection> {
    let subject = leaf.subject();
    let common_names: Vec<_> = subject.iter_common_name().filter_map(|name| name.as_str().ok()).collect();
    let mut organizations: Vec<_> = subject.iter_organization().filter_map(|name| name.as_str().ok()).collect();
    let mut wanted: Vec<_> = requested.organizations.iter().map(String::as_str).collect();
    organizations.sort_unstable();
    wanted.sort_unstable();
    if common_names == [requested.common_name.as_str()] && organizations == wanted {
        return Ok(());
    }
    let requested =
        wanted.iter().map(|name| format!("O={name}, ")).collect::<String>() + "CN=" + &requested.common_name;
    Err(Rejection::OtherSubject { requested, issued: subject.to_string() })
}

pub(super) fn check_names(leaf: &X509Certificate<'_>, requested: &Template) -> Result<(), Rejection> {
    let (mut dns_names, mut addresses) = (Vec::new(), Vec::new());
    if let Ok(Some(extension)) = leaf.subject_alternative_name() {
        for name in &extension.value.general_names {
            match name {
                GeneralName::DNSName(name) => dns_names.push(*name),
                GeneralName::IPAddress(bytes) => addresses.extend(match bytes.len() {
                    4 => <[u8; 4]>::try_from(*bytes).ok().map(IpAddr::from),
                    _ => <[u8; 16]>::try_from(*bytes).ok().map(IpAddr::from),
                }),
                _ => {}
            }
        }
    }
    if let Some(missing) = requested.dns_names.iter().find(|name| !dns_names.contains(&name.as_str())) {
        return Err(Rejection::Missing(format!("the DNS name {missing}")));
    }
    if let Some(missing) = requested.ip_addresses.iter().find(|address| !addresses.contains(address)) {
        return Err(Rejection::Missing(format!("the IP address {missing}")));
    }
    Ok(())
}

pub(super) fn check_usages(leaf: &X509Certificate<'_>) -> Result<(), Rejection> {
    match leaf.key_usage() {
        Ok(Some(usage)) if usage.value.digital_signature() => {}
        // A certificate without the extension is good for everything (RFC 5280, section 4.2.1.3).
        Ok(None) => {}
        _ => return Err(Rejection::Missing("the key usage digitalSignature".to_owned())),
    }
    match leaf.extended_key_usage() {
        Ok(Some(usage)) if usage.value.client_auth || usage.value.any => Ok(()),
        Ok(None) => Ok(()),
        _ => Err(Rejection::Missing("the extended key usage clientAuth".to_owned())),
    }
}

pub(super) fn check_authority(chain: &[Vec<u8>], authorities: &[Vec<u8>]) -> Result<(), Rejection> {
    let mut current = parse(&chain[0])?;
    // Each certificate of the chain is used at most once, so this terminates.
    let mut intermediates = chain[1..].iter().map(|der| parse(der)).collect::<Result<Vec<_>, _>>()?;
    loop {
        for authority in authorities {
            // Go passes over what it cannot read in a bundle.
            let Ok(authority) = parse(authority) else { continue };
            if authority.subject() == current.issuer() && current.verify_signature(Some(authority.public_key())).is_ok()
            {
                return Ok(());
            }
        }
        let next = intermediates.iter().position(|candidate| {
            candidate.is_ca()
                && candidate.subject() == current.issuer()
                && current.verify_signature(Some(candidate.public_key())).is_ok()
        });
        match next {
            Some(index) => current = intermediates.swap_remove(index),
            None => return Err(Rejection::Untrusted(format!("its issuer is {}", current.issuer()))),
        }
    }
}
