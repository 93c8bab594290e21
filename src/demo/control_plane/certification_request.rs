//! The PKCS#10 request in `spec.request` (RFC 2986), and the requirements of Kubernetes' signers.

use std::net::IpAddr;

use rcgen::{
    CertificateParams, DistinguishedName, DnType, DnValue, ExtendedKeyUsagePurpose, KeyUsagePurpose, SanType,
    SubjectPublicKeyInfo,
};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::der_parser::asn1_rs::Tag;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Name;

/// The signer of a node's client certificate.
pub(super) const KUBE_APISERVER_CLIENT_KUBELET: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// The signer of a node's serving certificate.
pub(super) const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
/// The signer of other client certificates.
pub(super) const KUBE_APISERVER_CLIENT: &str = "kubernetes.io/kube-apiserver-client";

/// All values of KeyUsage in certificates.k8s.io/v1.
const KNOWN_USAGES: [&str; 23] = [
    "signing",
    "digital signature",
    "content commitment",
    "key encipherment",
    "key agreement",
    "data encipherment",
    "cert sign",
    "crl sign",
    "encipher only",
    "decipher only",
    "any",
    "server auth",
    "client auth",
    "code signing",
    "email protection",
    "s/mime",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "timestamping",
    "ocsp signing",
    "microsoft sgc",
    "netscape sgc",
];

/// The contents of a verified PKCS#10 request.
pub(super) struct CertificationRequest {
    subject: Vec<(Vec<u64>, DnValue)>,
    pub(super) common_name: String,
    pub(super) organizations: Vec<String>,
    alternative_names: Vec<SanType>,
    public_key: Vec<u8>,
}

impl CertificationRequest {
    /// Parses the first PEM block, as kube-apiserver does, and verifies the signature that proves possession of the
    /// key. The error is the API server's message about `spec.request`.
    pub(super) fn parse(request: &[u8]) -> Result<Self, String> {
        let block = pem::parse(request).map_err(|_| "PEM block type must be CERTIFICATE REQUEST".to_owned())?;
        if block.tag() != "CERTIFICATE REQUEST" {
            return Err("PEM block type must be CERTIFICATE REQUEST".to_owned());
        }
        let malformed = |error: &dyn std::fmt::Display| format!("malformed PKCS#10: {error}");
        let (rest, request) =
            X509CertificationRequest::from_der(block.contents()).map_err(|error| malformed(&error))?;
        if !rest.is_empty() {
            return Err(malformed(&"trailing data"));
        }
        request.verify_signature().map_err(|error| format!("the request's signature does not verify: {error}"))?;

        let information = &request.certification_request_info;
        let subject = subject(&information.subject)?;
        let mut alternative_names = Vec::new();
        for extension in request.requested_extensions().into_iter().flatten() {
            if let ParsedExtension::SubjectAlternativeName(names) = extension {
                for name in &names.general_names {
                    alternative_names.push(alternative_name(name)?);
                }
            }
        }
        let strings = |names: x509_parser::x509::X509Name<'_>, organization: bool| -> Vec<String> {
            let attributes: Vec<_> = if organization {
                names.iter_organization().filter_map(|value| value.as_str().ok()).map(str::to_owned).collect()
            } else {
                names.iter_common_name().filter_map(|value| value.as_str().ok()).map(str::to_owned).collect()
            };
            attributes
        };
        Ok(Self {
            // Of several common names, Go's x509 uses the last.
            common_name: strings(information.subject.clone(), false).pop().unwrap_or_default(),
            organizations: strings(information.subject.clone(), true),
            subject,
            alternative_names,
            public_key: information.subject_pki.raw.to_vec(),
        })
    }

    /// Checks the signer's requirements for this request with these usages (kubernetes
    /// pkg/apis/certificates/helpers.go). The error is the reason in one sentence.
    pub(super) fn check_for_signer(&self, signer_name: &str, usages: &[String]) -> Result<(), String> {
        let exactly = |extended: &str| {
            let allowed =
                |usage: &String| [extended, "digital signature", "key encipherment"].contains(&usage.as_str());
            let has = |wanted: &str| usages.iter().any(|usage| usage == wanted);
            has(extended) && has("digital signature") && usages.iter().all(allowed)
        };
        match signer_name {
            KUBE_APISERVER_CLIENT_KUBELET => {
                self.check_node_subject()?;
                if !self.alternative_names.is_empty() {
                    return Err("subjectAltNames are not allowed".to_owned());
                }
                if !exactly("client auth") {
                    return Err("usages did not match [client auth digital signature]".to_owned());
                }
            }
            KUBELET_SERVING => {
                self.check_node_subject()?;
                if self.alternative_names.is_empty() {
                    return Err("DNS or IP subjectAltName is required".to_owned());
                }
                let served = |name: &SanType| matches!(name, SanType::DnsName(_) | SanType::IpAddress(_));
                if !self.alternative_names.iter().all(served) {
                    return Err("email and URI subjectAltNames are not allowed".to_owned());
                }
                if !exactly("server auth") {
                    return Err("usages did not match [server auth digital signature]".to_owned());
                }
            }
            KUBE_APISERVER_CLIENT => {
                let allowed =
                    |usage: &String| ["client auth", "digital signature", "key encipherment"].contains(&usage.as_str());
                if !usages.iter().any(|usage| usage == "client auth") || !usages.iter().all(allowed) {
                    return Err("usages did not match [client auth digital signature key encipherment]".to_owned());
                }
            }
            _ => return Err(format!("no signer is named {signer_name}")),
        }
        Ok(())
    }

    fn check_node_subject(&self) -> Result<(), String> {
        if self.organizations != ["system:nodes"] {
            return Err("subject organization is not system:nodes".to_owned());
        }
        if !self.common_name.starts_with("system:node:") {
            return Err("subject common name does not begin with system:node:".to_owned());
        }
        Ok(())
    }

    /// The parameters of the certificate: subject, subjectAltNames and usages. As in kube-controller-manager, other
    /// extensions of the request are ignored.
    pub(super) fn certificate_params(
        &self,
        usages: &[String],
        drop_first_alternative_name: bool,
    ) -> Result<(CertificateParams, SubjectPublicKeyInfo), String> {
        let public_key = SubjectPublicKeyInfo::from_der(&self.public_key).map_err(|error| error.to_string())?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for (object_identifier, value) in &self.subject {
            let attribute = DnType::from_oid(object_identifier);
            if params.distinguished_name.get(&attribute).is_some() {
                return Err("a subject that repeats an attribute is not supported".to_owned());
            }
            params.distinguished_name.push(attribute, value.clone());
        }
        params.subject_alt_names =
            self.alternative_names.iter().skip(usize::from(drop_first_alternative_name)).cloned().collect();
        for usage in usages {
            use ExtendedKeyUsagePurpose as Extended;
            use KeyUsagePurpose as Usage;
            match usage.as_str() {
                "signing" | "digital signature" => params.key_usages.push(Usage::DigitalSignature),
                "content commitment" => params.key_usages.push(Usage::ContentCommitment),
                "key encipherment" => params.key_usages.push(Usage::KeyEncipherment),
                "client auth" => params.extended_key_usages.push(Extended::ClientAuth),
                "server auth" => params.extended_key_usages.push(Extended::ServerAuth),
                other => return Err(format!("usage {other:?} is not supported")),
            }
        }
        Ok((params, public_key))
    }
}

/// The first of `usages` that is not defined in certificates.k8s.io/v1.
pub(super) fn unknown_usage(usages: &[String]) -> Option<&String> {
    usages.iter().find(|usage| !KNOWN_USAGES.contains(&usage.as_str()))
}

fn subject(name: &X509Name<'_>) -> Result<Vec<(Vec<u64>, DnValue)>, String> {
    let mut attributes = Vec::new();
    for attribute in name.iter_attributes() {
        let object_identifier = attribute.attr_type().iter().ok_or("malformed subject")?.collect();
        let text = attribute.as_str().map_err(|_| "the subject's strings must be UTF-8 or printable".to_owned())?;
        let value = match attribute.attr_value().header.tag() {
            // The string type is preserved, so that the issued subject is byte for byte the requested one.
            Tag::PrintableString => DnValue::PrintableString(text.try_into().map_err(|_| "malformed subject")?),
            _ => DnValue::Utf8String(text.to_owned()),
        };
        attributes.push((object_identifier, value));
    }
    Ok(attributes)
}

fn alternative_name(name: &GeneralName<'_>) -> Result<SanType, String> {
    let malformed = |_| "malformed subjectAltName".to_owned();
    Ok(match name {
        GeneralName::DNSName(name) => SanType::DnsName((*name).try_into().map_err(malformed)?),
        GeneralName::RFC822Name(name) => SanType::Rfc822Name((*name).try_into().map_err(malformed)?),
        GeneralName::URI(name) => SanType::URI((*name).try_into().map_err(malformed)?),
        GeneralName::IPAddress(bytes) => {
            let address = <[u8; 4]>::try_from(*bytes)
                .map(IpAddr::from)
                .or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from))
                .map_err(|_| "an IP subjectAltName must have 4 or 16 bytes".to_owned())?;
            SanType::IpAddress(address)
        }
        _ => return Err("only DNS, IP, email and URI subjectAltNames are supported".to_owned()),
    })
}
