//! `pintle inspect`: describes a certificate, a certification request or a pair.

use std::fmt::Write;
use std::io::Read;
use std::path::PathBuf;

use pintle_agent_core::UnixTime;
use pintle_agent_core::pem_block::PemBlocks;
use pintle_agent_core::text::printable;
use pintle_plugins_api::PublicKey;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::{FromDer, X509Certificate, X509Extension};
use zeroize::Zeroizing;

use super::{CliError, Exit, print};
use crate::config::{Config, Flags};
use crate::world::clock;

const NOT_X509: &str = "a CERTIFICATE block does not contain an X.509 certificate";

/// The arguments of `pintle inspect`.
#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    flags: Flags,
    /// The PEM file, or - for standard input [default: the current pair]
    file: Option<PathBuf>,
    /// The identity whose current pair to inspect [default: the only one]
    #[arg(long, value_name = "NAME", conflicts_with = "file")]
    identity: Option<String>,
}

impl Arguments {
    pub(super) fn run(self) -> Result<Exit, CliError> {
        let path = match self.file {
            Some(file) => file,
            None => Config::load(&self.flags)?.identity(self.identity.as_deref())?.pairs().current(),
        };
        let mut content = Vec::new();
        let read = if path.as_os_str() == "-" {
            std::io::stdin().read_to_end(&mut content).map(|_| ())
        } else {
            std::fs::read(&path).map(|read| content = read)
        };
        read.map_err(|error| {
            let detail = format!("{} cannot be read: {error}", path.display());
            CliError::new(Exit::Usage, detail, "specify a PEM file, or - for standard input")
        })?;
        let text = describe(&Zeroizing::new(content)).map_err(|detail| {
            let detail = format!("{}: {detail}", path.display());
            CliError::new(
                Exit::Problem,
                detail,
                "the input must be PEM: a certificate, a certification request, or a pair",
            )
        })?;
        print(&text)?;
        Ok(Exit::Ok)
    }
}

/// Describes the contents of a PEM text. Never includes private key material.
fn describe(input: &[u8]) -> Result<String, String> {
    let PemBlocks { blocks, damaged } = PemBlocks::of(input);
    match damaged {
        Some(line) if blocks.is_empty() => return Err(format!("the PEM block that begins in line {line} is damaged")),
        None if blocks.is_empty() => return Err("no PEM block found".to_owned()),
        _ => {}
    }
    let mut text = String::new();
    let mut leaf_key = None;
    for block in &blocks {
        match block.label.as_str() {
            "CERTIFICATE" => {
                let (_, certificate) = X509Certificate::from_der(&block.content).map_err(|_| NOT_X509.to_owned())?;
                text += &describe_certificate(&certificate, leaf_key.is_none());
                leaf_key.get_or_insert_with(|| certificate.public_key().raw.to_vec());
            }
            "CERTIFICATE REQUEST" => {
                let (_, request) = X509CertificationRequest::from_der(&block.content)
                    .map_err(|_| "a CERTIFICATE REQUEST block does not contain a PKCS#10 request".to_owned())?;
                text += &describe_request(&request);
            }
            "PRIVATE KEY" | "EC PRIVATE KEY" | "RSA PRIVATE KEY" => text += "private key: in this file\n",
            "TSS2 PRIVATE KEY" => text += "private key: in the TPM that created it; this file only refers to it\n",
            tag => text += &format!("{}: not inspected\n", printable(tag)),
        }
    }
    if let Some(line) = damaged {
        let _ = writeln!(text, "the PEM block that begins in line {line} is damaged");
    }
    Ok(text)
}

fn describe_certificate(certificate: &X509Certificate<'_>, leaf: bool) -> String {
    let validity = certificate.validity();
    let (begin, end) = (
        UnixTime::from_seconds(validity.not_before.timestamp()),
        UnixTime::from_seconds(validity.not_after.timestamp()),
    );
    let now = clock::now();
    let standing = if now < begin {
        "not yet valid".to_owned()
    } else if now >= end {
        "expired".to_owned()
    } else {
        format!(
            "valid, {} % of its lifetime is left",
            end.since(now).as_secs() * 100 / end.since(begin).as_secs().max(1)
        )
    };
    let mut text = format!("{}\n", if leaf { "certificate (leaf)" } else { "certificate (chain)" });
    let _ = writeln!(text, "  subject     {}", printable(&certificate.subject().to_string()));
    let _ = writeln!(text, "  issuer      {}", printable(&certificate.issuer().to_string()));
    let _ = writeln!(text, "  serial      {}", certificate.raw_serial_as_string().replace(':', "").to_uppercase());
    let _ = writeln!(text, "  validity    {begin} to {end}: {standing}");
    let _ = writeln!(text, "  public key  {}", describe_public_key(certificate.public_key().raw));
    for extension in certificate.extensions() {
        text += &describe_extension(extension);
    }
    text
}

fn describe_request(request: &X509CertificationRequest<'_>) -> String {
    let information = &request.certification_request_info;
    let mut text = "certification request\n".to_owned();
    let _ = writeln!(text, "  subject     {}", printable(&information.subject.to_string()));
    let _ = writeln!(text, "  public key  {}", describe_public_key(information.subject_pki.raw));
    let signature = if request.verify_signature().is_ok() { "valid" } else { "INVALID: not made with this key" };
    let _ = writeln!(text, "  signature   {signature}");
    for extension in request.requested_extensions().into_iter().flatten() {
        text += &describe_parsed_extension(extension);
    }
    text
}

fn describe_public_key(subject_public_key_info: &[u8]) -> String {
    match PublicKey::from_der(subject_public_key_info) {
        Ok(key) => format!("{}, SHA-256 {}", key.algorithm(), key.fingerprint()),
        Err(error) => error.to_string(),
    }
}

fn describe_extension(extension: &X509Extension<'_>) -> String {
    describe_parsed_extension(extension.parsed_extension())
}

fn describe_parsed_extension(extension: &ParsedExtension<'_>) -> String {
    match extension {
        ParsedExtension::KeyUsage(usage) => format!("  key usage   {usage}\n"),
        ParsedExtension::ExtendedKeyUsage(usage) => {
            let mut names = Vec::new();
            for (has, name) in
                [(usage.client_auth, "client auth"), (usage.server_auth, "server auth"), (usage.any, "any")]
            {
                if has {
                    names.push(name);
                }
            }
            format!("  usages      {}\n", names.join(", "))
        }
        ParsedExtension::SubjectAlternativeName(names) => {
            let names: Vec<_> =
                names.general_names.iter().map(|name| printable(&GeneralName::to_string(name))).collect();
            format!("  names       {}\n", names.join(", "))
        }
        ParsedExtension::BasicConstraints(constraints) if constraints.ca => "  authority   yes\n".to_owned(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_cannot_inject_terminal_escapes() {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "a\u{1b}[2J\n  issuer  b");
        let key = rcgen::KeyPair::generate().expect("a key");
        let text = describe(parameters.self_signed(&key).expect("a certificate").pem().as_bytes()).expect("PEM");
        assert!(text.contains("a\\u{1b}[2J\\n  issuer  b") && !text.contains('\u{1b}'), "{text}");
    }
}
