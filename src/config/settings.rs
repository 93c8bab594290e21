//! The settings of one identity. They stand in its table `[[identity]]`, or at the top level of a file without such a
//! table, and are listed once, here.
//!
//! serde's `flatten` would do without a macro, but not together with `deny_unknown_fields`, and errors would lose their
//! lines.

/// Calls a macro with the list, as `KEY FIELD: TYPE,`, and with whatever follows its name.
macro_rules! identity_settings {
    ($callback:ident! $($rest:tt)*) => {
        $callback! {
            [
                "cert-dir" cert_dir: PathBuf,
                "rotate-certificates" rotate_certificates: bool,
                "client-ca-file" client_ca_file: PathBuf,
                "keep-pairs" keep_pairs: usize,
                "backend" backend: String,
                "key-algorithm" key_algorithm: KeyAlgorithm,
                "expiration-seconds" expiration_seconds: i32,
                "on-key-loss" on_key_loss: OnKeyLoss,
                "[proxy]" proxy: ProxyTable,
            ]
            $($rest)*
        }
    };
}

/// Declares a struct with these fields and, after them, the settings of one identity.
macro_rules! with_settings {
    (
        [$($key:literal $setting:ident: $type:ty,)*]
        $(#[$attribute:meta])*
        $visibility:vis struct $name:ident { $($fields:tt)* }
    ) => {
        $(#[$attribute])*
        $visibility struct $name {
            $($fields)*
            $(pub(super) $setting: Option<$type>,)*
        }
    };
}

/// The keys of those settings that this struct has a value for.
macro_rules! given_settings {
    ([$($key:literal $setting:ident: $type:ty,)*] $of:expr) => {
        [$(($key, $of.$setting.is_some())),*].into_iter().filter_map(|(key, given)| given.then_some(key)).collect()
    };
}

/// Moves the settings from one struct to another.
macro_rules! move_settings {
    ([$($key:literal $setting:ident: $type:ty,)*] $from:expr => $to:expr) => {
        $($to.$setting = $from.$setting.take();)*
    };
}

pub(super) use {given_settings, identity_settings, move_settings, with_settings};
