//! The ways in which a backend may lie.

/// What a device does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    OnlyEd25519,
    NewKeyAtEachGenerate,
    AnotherAlgorithmThanAsked,
    ConflictIgnored,
    UnknownAlgorithmIsUnavailable,
    OneKeyForAll,
    GarbageSignature,
    EmptyMessageRefused,
    LongMessageCut,
    ForeignSchemeAccepted,
    AbsentKeyHasPublicKey,
    AbsentKeyIsCorrupt,
    AbsentKeySigns,
    ErrorOfManyLines,
    ReferenceHoldsPrivateKey,
    ReferenceHoldsPin,
    ReferenceToAbsentFile,
    ListIsEmpty,
    ListRepeats,
    ListShowsForeignKeys,
    UsageFails,
    UsageHasNoName,
    UsageIsBeyondTheLimit,
    IdEndsAtNul,
    IdIsText,
    IdIsPrefix,
    DeleteDoesNothing,
    DeleteOfAbsentKeyFails,
    DeletedKeySignsFromMemory,
    DeletedKeyComesBackAtRestart,
    DeletedKeyIsGeneratedAgain,
    DeleteTakesAnotherKeyToo,
    KeysForgottenAtRestart,
    OpensOnlyOnce,
    CallersMixedUp,
    GoneDeviceIsNotFound,
    GoneDeviceSigns,
    GoneDeviceDeletes,
    ReturnedDeviceIsLocked,
    WrongPinIsUnavailable,
    WrongPinIsRetried,
    LostKeyIsCorrupt,
    LostKeySigns,
    Panics,
}

impl Lie {
    /// Whether throwaway keys stay behind under this lie.
    pub(crate) fn leaves_keys(self) -> bool {
        matches!(
            self,
            Self::DeleteDoesNothing
                | Self::DeletedKeyComesBackAtRestart
                | Self::DeleteTakesAnotherKeyToo
                | Self::ReturnedDeviceIsLocked
                | Self::LostKeySigns
        )
    }
}

/// Each lie, and how the name of the check begins that must catch it.
pub(crate) const LIES: &[(Lie, &str)] = &[
    (Lie::OnlyEd25519, "generate ecdsa-p256"),
    (Lie::NewKeyAtEachGenerate, "generate ecdsa-p256 again"),
    (Lie::AnotherAlgorithmThanAsked, "generate ed25519"),
    (Lie::ConflictIgnored, "generate with another algorithm"),
    (Lie::UnknownAlgorithmIsUnavailable, "generate of an algorithm that it does not have"),
    (Lie::OneKeyForAll, "two ids are two keys"),
    (Lie::GarbageSignature, "sign EcdsaP256Sha256"),
    (Lie::EmptyMessageRefused, "sign Ed25519"),
    (Lie::LongMessageCut, "sign Ed25519"),
    (Lie::ForeignSchemeAccepted, "ecdsa-p256 refuses the schemes"),
    (Lie::AbsentKeyHasPublicKey, "an absent key"),
    (Lie::AbsentKeyIsCorrupt, "an absent key"),
    (Lie::AbsentKeySigns, "an absent key"),
    (Lie::ErrorOfManyLines, "an absent key"),
    (Lie::ReferenceHoldsPrivateKey, "reference"),
    (Lie::ReferenceHoldsPin, "reference"),
    (Lie::ReferenceToAbsentFile, "reference"),
    (Lie::ListIsEmpty, "list shows"),
    (Lie::ListRepeats, "list shows"),
    (Lie::ListShowsForeignKeys, "a key that somebody else made"),
    (Lie::UsageFails, "usage"),
    (Lie::UsageHasNoName, "usage"),
    (Lie::UsageIsBeyondTheLimit, "usage"),
    (Lie::IdEndsAtNul, "ids of any octets"),
    (Lie::IdIsText, "ids of any octets"),
    (Lie::IdIsPrefix, "an id that begins as another"),
    (Lie::DeleteDoesNothing, "delete destroys"),
    (Lie::DeleteDoesNothing, "all throwaway keys"),
    (Lie::DeleteOfAbsentKeyFails, "delete of an absent key"),
    (Lie::DeletedKeySignsFromMemory, "delete destroys"),
    (Lie::DeletedKeyComesBackAtRestart, "delete destroys"),
    (Lie::DeletedKeyIsGeneratedAgain, "generate after delete"),
    (Lie::DeleteTakesAnotherKeyToo, "the keys that were there before"),
    (Lie::KeysForgottenAtRestart, "keys outlive a restart"),
    (Lie::OpensOnlyOnce, "concurrent callers"),
    (Lie::CallersMixedUp, "concurrent callers"),
    (Lie::GoneDeviceIsNotFound, "while the device is gone"),
    (Lie::GoneDeviceSigns, "while the device is gone"),
    (Lie::GoneDeviceDeletes, "while the device is gone"),
    (Lie::ReturnedDeviceIsLocked, "while the device is gone"),
    (Lie::WrongPinIsUnavailable, "a refused PIN"),
    (Lie::WrongPinIsRetried, "a refused PIN"),
    (Lie::LostKeyIsCorrupt, "a lost key"),
    (Lie::LostKeySigns, "a lost key"),
    (Lie::Panics, "sign Ed25519"),
];
