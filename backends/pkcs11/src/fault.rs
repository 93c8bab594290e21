//! PKCS#11's return values (PKCS #11 v3.1, section 5.1), sorted by what to do next.

use cryptoki::error::{Error, RvError};
use pintle_plugins_api::{BackendError, BackendErrorKind};

/// Why an operation on a session ended early.
pub(crate) enum Fault {
    /// The module answered with an error, and a new session may help.
    Device(Error),
    /// The answer for the caller, whatever a new session would say.
    Final(BackendError),
    /// Another program may be writing to the token just now: the operation is to be repeated after a moment. Once that
    /// has not helped often enough, it is this.
    Busy(Box<Fault>),
}

impl Fault {
    /// What may be nothing but another program that is writing to the token.
    pub(crate) fn busy(fault: impl Into<Self>) -> Self {
        Self::Busy(Box::new(fault.into()))
    }

    /// A write that the module refused. Kryoptic does not wait for another process that writes, and says
    /// CKR_DEVICE_MEMORY, as does a token that is full.
    pub(crate) fn of_writing(error: Error) -> Self {
        if return_value(&error) == Some(RvError::DeviceMemory) { Self::busy(error) } else { error.into() }
    }

    /// What it is when there is no more waiting: the module's error, or the answer for the caller.
    pub(crate) fn settled(self) -> Result<Error, BackendError> {
        match self {
            Self::Device(error) => Ok(error),
            Self::Final(error) => Err(error),
            Self::Busy(fault) => fault.settled(),
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self::Device(error)
    }
}

/// The return value, if the error is one.
pub(crate) fn return_value(error: &Error) -> Option<RvError> {
    match error {
        Error::Pkcs11(value, _) => Some(*value),
        _ => None,
    }
}

/// Whether a new session, logged in again, with its objects found again, may do better.
///
/// Modules disagree about what a lost session is: for "not logged in" alone SoftHSM says CKR_OBJECT_HANDLE_INVALID,
/// tpm2-pkcs11 CKR_USER_NOT_LOGGED_IN and kryoptic CKR_GENERAL_ERROR. So anything that could mean it counts.
pub(crate) fn is_recoverable(error: &Error) -> bool {
    use RvError::*;
    matches!(
        return_value(error),
        Some(
            CryptokiNotInitialized
                | DeviceError
                | DeviceRemoved
                | FunctionCanceled
                | FunctionFailed
                | GeneralError
                | KeyHandleInvalid
                | ObjectHandleInvalid
                | OperationActive
                | OperationNotInitialized
                | SessionClosed
                | SessionHandleInvalid
                | SlotIdInvalid
                | TokenNotPresent
                | TokenNotRecognized
                | UserNotLoggedIn
                | UserPinNotInitialized
        )
    )
}

/// Whether it says that the token is not there.
pub(crate) fn is_absence(error: &Error) -> bool {
    use RvError::*;
    matches!(return_value(error), Some(DeviceRemoved | SlotIdInvalid | TokenNotPresent | TokenNotRecognized))
}

/// Whether the module says that it has not got this mechanism, or not for this key.
pub(crate) fn is_mechanism_missing(error: &Error) -> bool {
    use RvError::*;
    matches!(
        return_value(error),
        Some(
            FunctionNotSupported
                | MechanismInvalid
                | MechanismParamInvalid
                | KeyTypeInconsistent
                | KeyFunctionNotPermitted
        )
    )
}

/// Whether the module dislikes an attribute of a template rather than the request as a whole.
pub(crate) fn is_template_refused(error: &Error) -> bool {
    use RvError::*;
    matches!(
        return_value(error),
        Some(
            AttributeReadOnly
                | AttributeTypeInvalid
                | AttributeValueInvalid
                | CurveNotSupported
                | DomainParamsInvalid
                | TemplateInconsistent
        )
    )
}

/// The error for the caller, once there is nothing left to try.
pub(crate) fn answer(error: &Error) -> BackendError {
    use RvError::*;
    let detail = describe(error);
    let Some(value) = return_value(error) else {
        let kind = match error {
            Error::NullFunctionPointer | Error::NotSupported => BackendErrorKind::Unsupported,
            _ => BackendErrorKind::Corrupt,
        };
        return BackendError::new(kind, detail);
    };
    let error = |kind| BackendError::new(kind, detail.clone());
    match value {
        DeviceMemory => error(BackendErrorKind::Unavailable).with_hint(
            "the token is full, or another program is writing to it: if this lasts, make room (pintle keys prune)",
        ),
        SessionCount => {
            error(BackendErrorKind::Unavailable).with_hint("other programs hold every session that the token allows")
        }
        ActionProhibited | TokenWriteProtected | SessionReadOnly => {
            error(BackendErrorKind::Unsupported).with_hint("the token does not let its objects be changed")
        }
        AttributeReadOnly
        | AttributeTypeInvalid
        | AttributeValueInvalid
        | CurveNotSupported
        | DomainParamsInvalid
        | FunctionNotSupported
        | KeyFunctionNotPermitted
        | KeySizeRange
        | KeyTypeInconsistent
        | MechanismInvalid
        | MechanismParamInvalid
        | TemplateIncomplete
        | TemplateInconsistent => error(BackendErrorKind::Unsupported),
        _ => error(BackendErrorKind::Unavailable),
    }
}

/// An error as PKCS#11 writes it, such as `C_SignInit: CKR_OBJECT_HANDLE_INVALID`, on one line.
pub(crate) fn describe(error: &Error) -> String {
    match error {
        Error::Pkcs11(RvError::VendorDefined(code) | RvError::UnknownErrorCode(code), function) => {
            format!("C_{function:?}: CKR_{code:#x}")
        }
        Error::Pkcs11(value, function) => format!("C_{function:?}: CKR_{}", upper_snake_case(&format!("{value:?}"))),
        other => other.to_string().replace('\n', " "),
    }
}

fn upper_snake_case(name: &str) -> String {
    let mut text = String::new();
    for (position, letter) in name.chars().enumerate() {
        if letter.is_ascii_uppercase() && position > 0 {
            text.push('_');
        }
        text.push(letter.to_ascii_uppercase());
    }
    text
}

#[cfg(test)]
mod tests {
    use cryptoki::context::Function;

    use super::*;

    #[test]
    fn errors_are_written_as_in_the_standard() {
        let error = Error::Pkcs11(RvError::ObjectHandleInvalid, Function::SignInit);
        assert_eq!(describe(&error), "C_SignInit: CKR_OBJECT_HANDLE_INVALID");
        let vendor = Error::Pkcs11(RvError::VendorDefined(0x8000_0001), Function::Login);
        assert_eq!(describe(&vendor), "C_Login: CKR_0x80000001");
    }

    #[test]
    fn each_modules_way_to_say_not_logged_in_is_recoverable() {
        for value in [RvError::ObjectHandleInvalid, RvError::UserNotLoggedIn, RvError::GeneralError] {
            assert!(is_recoverable(&Error::Pkcs11(value, Function::SignInit)), "{value:?}");
        }
        assert!(!is_recoverable(&Error::Pkcs11(RvError::PinIncorrect, Function::Login)));
    }
}
