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
use yasna::Tag;
use yasna::models::ObjectIdentifier;

const LABEL: &str = "TSS2 PRIVATE KEY";

/// 2.23.133.10.1.3, `id-loadablekey`.
const LOADABLE_KEY: &[u64] = &[2, 23, 133, 10, 1, 3];

/// TPM_RH_OWNER: the parent is the storage primary that its reader derives from the owner's seed.
const OWNER: u32 = 0x4000_0001;

/// A key as the TPM gave it out: the private half is encrypted, and of use to that TPM only.
#[derive(Clone, Debug)]
pub(crate) struct KeyFile {
    pub(crate) public: Public,
    pub(crate) private: Private,
}

impl KeyFile {
    /// The PEM text; `None` if the public area cannot be marshalled.
    pub(crate) fn to_pem(&self) -> Option<String> {
        let (public, private) = (sized(&self.public.marshall().ok()?)?, sized(self.private.value())?);
        let content = yasna::construct_der(|writer| {
            writer.write_sequence(|writer| {
                writer.next().write_oid(&ObjectIdentifier::from_slice(LOADABLE_KEY));
                writer.next().write_tagged(Tag::context(0), |writer| writer.write_bool(true));
                writer.next().write_u32(OWNER);
                writer.next().write_bytes(&public);
                writer.next().write_bytes(&private);
            });
        });
        let line_ending = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        Some(pem::encode_config(&pem::Pem::new(LABEL, content), line_ending))
    }

    /// Parses the PEM text; `None` unless it is a loadable key under the owner's primary with an empty authorization.
    pub(crate) fn from_pem(text: &str) -> Option<Self> {
        let pem = pem::parse(text).ok().filter(|pem| pem.tag() == LABEL)?;
        let content = yasna::parse_der(pem.contents(), |reader| {
            reader.read_sequence(|reader| {
                let kind = reader.next().read_oid()?;
                let is_empty = reader.next().read_tagged(Tag::context(0), |reader| reader.read_bool())?;
                let parent = reader.next().read_u32()?;
                Ok((kind, is_empty, parent, reader.next().read_bytes()?, reader.next().read_bytes()?))
            })
        });
        let (kind, is_empty, parent, public, private) = content.ok()?;
        if *kind.components() != LOADABLE_KEY || !is_empty || parent != OWNER {
            return None;
        }
        let (public, private) = (unsized_content(&public)?, unsized_content(&private)?);
        Some(Self { public: Public::unmarshall(public).ok()?, private: Private::try_from(private).ok()? })
    }
}

/// A TPM2B: 16 bits of length, and the content.
fn sized(content: &[u8]) -> Option<Vec<u8>> {
    let length = u16::try_from(content.len()).ok()?;
    Some([&length.to_be_bytes(), content].concat())
}

fn unsized_content(bytes: &[u8]) -> Option<&[u8]> {
    let (length, content) = bytes.split_first_chunk::<2>()?;
    (usize::from(u16::from_be_bytes(*length)) == content.len()).then_some(content)
}
