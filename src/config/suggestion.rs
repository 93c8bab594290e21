//! "Did you mean …?" for a key that the configuration file does not have.

use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};

/// How alike two keys must be for one to be meant by the other, from 0 to 1.
const ALIKE: f64 = 0.8;

/// The known key that the first unknown one in this text resembles. `File`, `Identity` and `Proxy` are what the file, a
/// table `[[identity]]` and a table `[proxy]` are read into.
pub(super) fn for_unknown_key<'de, File, Identity, Proxy>(text: &str) -> Option<&'static str>
where
    File: Deserialize<'de>,
    Identity: Deserialize<'de>,
    Proxy: Deserialize<'de>,
{
    let table: toml::Table = text.parse().ok()?;
    let identities = || table.get("identity").and_then(toml::Value::as_array).into_iter().flatten();
    let proxies = table.get("proxy").into_iter().chain(identities().filter_map(|identity| identity.get("proxy")));
    None.or_else(|| in_table(&table, keys_of::<File>()))
        .or_else(|| identities().find_map(|table| in_table(table.as_table()?, keys_of::<Identity>())))
        .or_else(|| proxies.into_iter().find_map(|table| in_table(table.as_table()?, keys_of::<Proxy>())))
}

fn in_table(table: &toml::Table, known: &'static [&'static str]) -> Option<&'static str> {
    let unknown = table.keys().find(|key| !known.contains(&key.as_str()))?;
    let alike = |known: &str| strsim::jaro_winkler(unknown, known);
    let best = known.iter().copied().max_by(|one, other| alike(one).total_cmp(&alike(other)))?;
    (alike(best) >= ALIKE).then_some(best)
}

/// The keys of a table, as its type declares them to serde.
fn keys_of<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut keys: &'static [&'static str] = &[];
    // Always an error: it was not asked for a value.
    let _ = T::deserialize(KeysOnly(&mut keys));
    keys
}

/// A deserializer that takes note of the keys of a struct, and gives nothing.
struct KeysOnly<'a>(&'a mut &'static [&'static str]);

impl<'de> Deserializer<'de> for KeysOnly<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(Error::custom("not a struct"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Self::Error> {
        *self.0 = fields;
        Err(Error::custom("only its keys were asked for"))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::FileConfiguration;
    use super::super::identity::IdentityTable;
    use super::super::proxy::ProxyTable;
    use super::*;

    #[test]
    fn a_slip_is_recognised_in_every_table_and_a_stranger_is_not() {
        for (text, meant) in [
            ("keep-pair = 3", Some("keep-pairs")),
            ("node-nmae = 'x'", Some("node-name")),
            ("[[identity]]\nname = 'x'\ncertdir = '/x'", Some("cert-dir")),
            ("[[identities]]\nname = 'x'", Some("identity")),
            ("[[identity]]\nname = 'x'\n[identity.proxy]\nlisten-on = '127.0.0.1:1'", Some("listen")),
            ("[proxy]\ndrian = '1m'", Some("drain")),
            ("zzz = 1", None),
            ("keep-pairs = 3", None),
        ] {
            assert_eq!(for_unknown_key::<FileConfiguration, IdentityTable, ProxyTable>(text), meant, "{text}");
        }
    }
}
