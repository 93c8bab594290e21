//! The `TSS2 PRIVATE KEY` format (draft-bottomley-tpm2-keys): what OpenSSL's tpm2 provider reads.
//!
//! ```text
//! TPMKey ::= SEQUENCE {
//!     type       OBJECT IDENTIFIER,               -- 2.23.133.10.1.3, a loadable key
//!     emptyAuth  [0] EXPLICIT BOOLEAN OPTIONAL,
//!     parent     INTEGER,                         -- 0x40000001, the owner hierarchy
//!     pubkey     OCTET STRING,                    -- TPM2B_PUBLIC
//!     privkey    OCTET STRING                     -- TPM2B_PRIVATE, encrypted by the TPM
//! }
//! ```

use tss_esapi::structures::{Private, Public};
use tss_esapi::traits::{Marshall, UnMarshall};

use crate::der;

const LABEL: &str = "TSS2 PRIVATE KEY";

/// 2.23.133.10.1.3, `id-loadablekey`.
const LOADABLE_KEY: [u8; 6] = [0x67, 0x81, 0x05, 0x0a, 0x01, 0x03];

/// TPM_RH_OWNER: the parent is the storage primary that its reader derives from the owner's seed.
const OWNER: [u8; 4] = [0x40, 0x00, 0x00, 0x01];

/// A key as the TPM gave it out: the private half is encrypted, and of use to that TPM only.
#[derive(Clone, Debug)]
pub(crate) struct KeyFile {
    pub(crate) public: Public,
    pub(crate) private: Private,
}

impl KeyFile {
    /// The PEM text; `None` if the public area cannot be marshalled.
    pub(crate) fn to_pem(&self) -> Option<String> {
        let content = [
            der::element(der::OBJECT_IDENTIFIER, &LOADABLE_KEY),
            der::element(der::EXPLICIT_0, &der::element(der::BOOLEAN, &[0xff])),
            der::unsigned_integer(&OWNER),
            der::element(der::OCTET_STRING, &sized(&self.public.marshall().ok()?)?),
            der::element(der::OCTET_STRING, &sized(self.private.value())?),
        ]
        .concat();
        let line_ending = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        Some(pem::encode_config(&pem::Pem::new(LABEL, der::element(der::SEQUENCE, &content)), line_ending))
    }

    /// Parses the PEM text; `None` unless it is a loadable key under the owner's primary with an empty authorization.
    pub(crate) fn from_pem(text: &str) -> Option<Self> {
        let pem = pem::parse(text).ok().filter(|pem| pem.tag() == LABEL)?;
        let mut file = pem.contents();
        let mut content = der::take(&mut file, der::SEQUENCE)?;
        let kind = der::take(&mut content, der::OBJECT_IDENTIFIER)?;
        let mut empty_authorization = der::take(&mut content, der::EXPLICIT_0)?;
        let is_empty = der::take(&mut empty_authorization, der::BOOLEAN)?;
        let parent = der::take(&mut content, der::INTEGER)?;
        let public = unsized_content(der::take(&mut content, der::OCTET_STRING)?)?;
        let private = unsized_content(der::take(&mut content, der::OCTET_STRING)?)?;
        let nothing_else = file.is_empty() && content.is_empty() && empty_authorization.is_empty();
        if kind != LOADABLE_KEY || is_empty != [0xff] || parent != OWNER || !nothing_else {
            return None;
        }
        Some(Self { public: Public::unmarshall(public).ok()?, private: Private::try_from(private).ok()? })
    }
}

/// A TPM2B: 16 bits of length, and the content.
fn sized(content: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(content.len()).ok()?;
    Some([&length.to_be_bytes(), content].concat())
}

fn unsized_content(octets: &[u8]) -> Option<&[u8]> {
    let (length, content) = octets.split_first_chunk::<2>()?;
    (usize::from(u16::from_be_bytes(*length)) == content.len()).then_some(content)
}
