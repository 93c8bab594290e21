//! One connection to the TPM, its slots, and which of its errors pass.

use std::hash::{BuildHasher, RandomState};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pintle_plugins_api::{BackendError, BackendErrorKind, Resource};
use tss_esapi::constants::response_code::Tss2ResponseCodeKind;
use tss_esapi::constants::tss::TPM2_TRANSIENT_FIRST;
use tss_esapi::constants::{CapabilityType, PropertyTag};
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::CapabilityData;
use tss_esapi::tcti_ldr::TctiNameConf;
use tss_esapi::{Context, Error};

/// How often a command that the TPM had no room or time for is sent again. With the pauses that is about 4 seconds.
const ATTEMPTS: u32 = 14;
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// Held during an operation: a TPM without a resource manager has room for three objects, and each operation needs
/// two, so the users in one process take turns.
static TURN: Mutex<()> = Mutex::new(());

/// The TPM. It is connected to when it is needed, and again after anything went wrong.
pub(crate) struct Device {
    address: TctiNameConf,
    /// How errors name the TPM.
    name: String,
    connection: Option<Context>,
}

impl Device {
    /// The TPM at this address. It is not connected to yet: it may be away, and come back.
    pub(crate) fn new(address: TctiNameConf, name: String) -> Self {
        Self { address, name, connection: None }
    }

    /// Runs an operation, which must flush whatever it loads; it is run again if the TPM was busy or has restarted.
    ///
    /// Blocks as long as the TPM takes, and up to 4 seconds more while it is busy.
    pub(crate) fn run<T>(
        &mut self,
        mut operation: impl FnMut(&mut Context) -> tss_esapi::Result<T>,
    ) -> Result<T, Failure> {
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut attempts = 1;
        let mut pause = FIRST_PAUSE;
        loop {
            let was_connected = self.connection.is_some();
            let error = match self.connected().and_then(&mut operation) {
                Ok(result) => return Ok(result),
                Err(error) => error,
            };
            // What the operation may have left in the TPM's slots is flushed with the connection, whose handles may
            // be of a TPM that has restarted since.
            self.connection = None;
            let failure = Failure { error, device: self.name.clone() };
            if failure.is_busy() && attempts < ATTEMPTS {
                std::thread::sleep(pause + jitter(pause));
                pause = (pause * 2).min(LONGEST_PAUSE);
                attempts += 1;
            } else if !was_connected || failure.is_answer() {
                return Err(failure);
            }
        }
    }

    /// Whether the TPM answers.
    pub(crate) fn check(&mut self) -> Result<(), BackendError> {
        let answered = self.run(|context| {
            context.execute_without_session(|context| {
                context.get_capability(CapabilityType::TpmProperties, PropertyTag::FamilyIndicator.into(), 1)
            })
        });
        answered.map(|_| ()).map_err(|failure| failure.into_error("answering"))
    }

    /// How much is taken of the TPM's room. Of what it does not tell, nothing is said. A resource manager such as
    /// `/dev/tpmrm0` shows nobody else's transient objects, and swaps them out.
    pub(crate) fn usage(&mut self) -> Result<Vec<Resource>, BackendError> {
        let answered = self.run(|context| {
            context.execute_without_session(|context| {
                let handles = CapabilityType::Handles;
                let (transient, _) = context.get_capability(handles, TPM2_TRANSIENT_FIRST, 254)?;
                let (first, count) = (PropertyTag::HrLoaded.into(), 7);
                let (properties, _) = context.get_capability(CapabilityType::TpmProperties, first, count)?;
                Ok((transient, properties))
            })
        });
        match answered.map_err(|failure| failure.into_error("telling its room"))? {
            (CapabilityData::Handles(transient), CapabilityData::TpmProperties(properties)) => {
                let property = |tag| properties.find(tag).map(|property| u64::from(property.value()));
                let room = |name, used: Option<u64>, available| {
                    used.zip(property(available)).map(|(used, free)| Resource::new(name, used, Some(used + free)))
                };
                use PropertyTag::{HrLoaded, HrLoadedAvail, HrPersistent, HrPersistentAvail, HrTransientAvail};
                let resources = [
                    room("transient objects", Some(transient.len() as u64), HrTransientAvail),
                    room("loaded sessions", property(HrLoaded), HrLoadedAvail),
                    room("persistent objects", property(HrPersistent), HrPersistentAvail),
                ];
                Ok(resources.into_iter().flatten().collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    fn connected(&mut self) -> tss_esapi::Result<&mut Context> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let mut context = Context::new(self.address.clone())?;
                // Parents and keys have an empty authorization.
                context.set_sessions((Some(AuthSession::Password), None, None));
                context
            }
        };
        Ok(self.connection.insert(connection))
    }
}

/// Up to half of the pause, so that two processes do not meet at the same slot again and again.
fn jitter(pause: Duration) -> Duration {
    // A hasher with a random seed of the standard library's.
    let random = RandomState::new().hash_one(0);
    pause.mul_f64(0.5 * random as f64 / u64::MAX as f64)
}

/// What the TPM, or what is between it and us, answered.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    error: Error,
    device: String,
}

impl Failure {
    /// The TPM's own answer, by which a later try is not going to be any better.
    pub(crate) fn is_answer(&self) -> bool {
        use Tss2ResponseCodeKind::*;
        matches!(
            self.kind(),
            Some(
                Integrity
                    | Hash
                    | Scheme
                    | Curve
                    | Value
                    | KeySize
                    | Symmetric
                    | Type
                    | Attributes
                    | AuthFail
                    | BadAuth
                    | Lockout
                    | Hierarchy
                    | Binding
                    | Size
                    | Insufficient
                    | CommandCode
                    | Disabled
            )
        ) && !self.is_stale()
    }

    /// Whether the key is of another TPM, or of this one before it was cleared.
    pub(crate) fn is_integrity(&self) -> bool {
        self.kind() == Some(Tss2ResponseCodeKind::Integrity)
    }

    /// Whether the TPM says that it cannot do what the parameters ask for.
    pub(crate) fn is_unsupported(&self) -> bool {
        use Tss2ResponseCodeKind::*;
        matches!(self.kind(), Some(Hash | Scheme | Curve | Value | KeySize | Symmetric | Type | CommandCode))
    }

    /// An error of a backend, about what was being done.
    pub(crate) fn into_error(self, doing: &str) -> BackendError {
        use Tss2ResponseCodeKind::{AuthFail, BadAuth, Disabled, Hierarchy, Lockout};
        let Self { error, device } = &self;
        let detail = match code(error) {
            // tss-esapi has no words for what the TCTI says (layer 10), which is the way to the TPM.
            Some(code) if (code >> 16) & 0xff == 10 => {
                format!("TPM {device}: {doing}: it cannot be reached ({code:#x})")
            }
            Some(code) => format!("TPM {device}: {doing}: {error} ({code:#x})"),
            None => format!("TPM {device}: {doing}: {error}"),
        };
        let (kind, hint) = match self.kind() {
            Some(AuthFail | BadAuth) => (
                BackendErrorKind::Locked,
                "the TPM's owner hierarchy has a password; pintle needs it without one, see tpm2_changeauth(1)",
            ),
            Some(Lockout) => (BackendErrorKind::Locked, "the TPM is locked out; see tpm2_dictionarylockout(1)"),
            Some(Hierarchy | Disabled) => {
                (BackendErrorKind::Unavailable, "enable the TPM's owner hierarchy in the firmware's settings")
            }
            _ if self.is_busy() => (
                BackendErrorKind::Unavailable,
                "others hold the TPM's slots; use the resource manager device:/dev/tpmrm0, or tpm2_flushcontext -t",
            ),
            _ if self.is_unsupported() => (BackendErrorKind::Unsupported, "the TPM cannot do this; use ecdsa-p256"),
            _ => (
                BackendErrorKind::Unavailable,
                "see that the TPM is there and that this user may open it (group tss for /dev/tpmrm0)",
            ),
        };
        BackendError::new(kind, detail).with_hint(hint)
    }

    /// The TPM's warnings by which the same command may succeed later (TPM 2.0 Library, part 2, section 6.6.3):
    /// 0x901 to 0x906 no room, 0x908 to 0x90a interrupted, 0x920 and 0x923 its memory is resting, 0x922 try again.
    fn is_busy(&self) -> bool {
        let Some(number) = self.tpm_code() else { return false };
        matches!(number, 0x901..=0x906 | 0x908..=0x90a | 0x920 | 0x922 | 0x923)
    }

    /// A value that was wrong may have been a handle from before the TPM restarted: parameter 1 of FlushContext.
    fn is_stale(&self) -> bool {
        matches!(self.tpm_code(), Some(0x1cb | 0x1c4))
    }

    /// What the TPM itself said; `None` if the error is not the TPM's.
    fn kind(&self) -> Option<Tss2ResponseCodeKind> {
        self.tpm_code()?;
        match self.error {
            Error::Tss2Error(code) => code.kind(),
            Error::WrapperError(_) => None,
        }
    }

    /// The TPM's response code; `None` if the error is not the TPM's.
    fn tpm_code(&self) -> Option<u32> {
        let code = code(&self.error)?;
        // Bits 16 to 23 are the layer (TSS 2.0 Overview, section 4): 0 the TPM, 12 the TPM as the resource manager
        // passes it on.
        matches!((code >> 16) & 0xff, 0 | 12).then_some(code & 0xffff)
    }
}

/// The response code, which tss-esapi shows as text only.
fn code(error: &Error) -> Option<u32> {
    let Error::Tss2Error(response) = error else { return None };
    let text = std::error::Error::source(response)?.to_string();
    u32::from_str_radix(text.rsplit_once("0x")?.1, 16).ok()
}

/// Whether a command failed for want of room or time.
pub(crate) fn is_busy(error: Error) -> bool {
    Failure { error, device: String::new() }.is_busy()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(code: u32) -> Failure {
        Failure { error: Error::Tss2Error(code.into()), device: "swtpm".to_owned() }
    }

    #[test]
    fn response_codes_are_told_apart() {
        for busy in [0x902, 0x908, 0x922, 0xc0902] {
            assert!(failure(busy).is_busy(), "{busy:#x}");
            assert_eq!(failure(busy).into_error("x").kind, BackendErrorKind::Unavailable);
        }
        assert!(failure(0x1df).is_integrity() && failure(0x1df).is_answer());
        assert!(!failure(0x1cb).is_answer(), "a handle of before a restart");
        assert_eq!(failure(0x921).into_error("x").kind, BackendErrorKind::Locked);
        assert_eq!(failure(0x9a2).into_error("x").kind, BackendErrorKind::Locked);
        assert_eq!(failure(0x2c3).into_error("x").kind, BackendErrorKind::Unsupported);
        // TSS2_TCTI_RC_IO_ERROR.
        let gone = failure(0xa000a);
        assert!(!gone.is_busy() && !gone.is_answer());
        let error = gone.into_error("signing");
        assert_eq!(error.kind, BackendErrorKind::Unavailable);
        assert!(error.detail.ends_with("it cannot be reached (0xa000a)"), "{error}");
    }
}
