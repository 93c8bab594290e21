//! What a parser says of a file, in words that hold none of the file's content.
//!
//! A parser quotes the line or the value that it stumbles over, and that may be a private key, a token or a PIN. Only what
//! comes from the schema, and the place in the file, is passed on.

/// Why a TOML text is refused: the line, counted from 1, and what is wrong there.
pub fn toml(text: &str, error: &toml::de::Error) -> String {
    let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
    // The parser's own messages are fixed texts; those of serde hold values.
    let what = match text.parse::<toml::Table>() {
        Err(syntax) => syntax.message().lines().next().unwrap_or_default().to_owned(),
        Ok(_) => of_schema(error.message()),
    };
    format!("line {line}: {what}")
}

/// Why a JSON text is refused: the line and the column, and what is wrong there.
pub fn json(error: &serde_json::Error) -> String {
    use serde_json::error::Category;
    let what = match error.classify() {
        Category::Io => return "it cannot be read".to_owned(),
        Category::Eof => "it ends too early".to_owned(),
        Category::Syntax => "it is not valid JSON".to_owned(),
        // The place stands at the end of the message.
        Category::Data => {
            let message = error.to_string();
            of_schema(message.rsplit_once(" at line ").map_or(message.as_str(), |(message, _)| message))
        }
    };
    format!("line {}, column {}: {what}", error.line(), error.column())
}

/// Why a JSON value, which has no lines, is refused.
pub fn json_value(error: &serde_json::Error) -> String {
    of_schema(&error.to_string())
}

/// Why a YAML text is refused: the line and the column, and what is wrong there.
pub fn yaml(error: &serde_saphyr::Error) -> String {
    use serde_saphyr::Error;
    let what = match error.without_snippet() {
        Error::DuplicateMappingKey { .. } => "a key appears twice".to_owned(),
        Error::Eof { .. } => "it ends too early".to_owned(),
        // A name of the schema, not of the file.
        Error::SerdeMissingField { field, .. } => format!("{field} is missing"),
        Error::Unexpected { expected, .. } => format!("this should be {expected}"),
        Error::SerdeInvalidType { .. } | Error::InvalidScalar { .. } => "a value of another type is needed".to_owned(),
        _ => "it is not valid YAML, or not what should stand there".to_owned(),
    };
    match error.location() {
        Some(location) => format!("line {}, column {}: {what}", location.line(), location.column()),
        None => what,
    }
}

/// What a message of serde says of the schema. All but the last part of it may come from the file.
fn of_schema(message: &str) -> String {
    // As a whole: a value that it quotes may have several lines, and words that look like serde's.
    if message.starts_with("missing field ") || message.starts_with("duplicate field ") {
        return message.to_owned();
    }
    // As src/config/file.rs words it.
    if message.starts_with("isolation ") || message == "invalid socket address syntax" {
        return message.to_owned();
    }
    let kind = ["unknown field", "unknown variant", "invalid type", "invalid value", "invalid length"];
    let kind = kind.into_iter().find(|kind| message.starts_with(kind));
    match (kind, message.rsplit_once(", expected ")) {
        (Some("unknown field"), Some((found, expected))) => match key_of(found) {
            Some(key) => format!("unknown field `{key}`, expected {expected}"),
            None => format!("unknown field, expected {expected}"),
        },
        (Some(kind), Some((_, expected))) => format!("{kind}, expected {expected}"),
        _ => "this value is not one that can be used here".to_owned(),
    }
}

/// The key in backquotes, if it looks like one that was mistyped: a line of base64 has capital letters.
fn key_of(found: &str) -> Option<&str> {
    let key = found.split('`').nth(1)?;
    let is_word = |character: char| character.is_ascii_lowercase() || matches!(character, '-' | '_');
    (key.len() <= 32 && key.chars().all(is_word)).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Schema {
        #[expect(dead_code, reason = "only the errors matter")]
        number: Option<u8>,
        #[expect(dead_code, reason = "only the errors matter")]
        word: Option<Word>,
    }

    #[derive(Debug, serde::Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Word {
        One,
        Two,
    }

    #[test]
    fn toml_errors_say_where_and_quote_nothing() {
        for (text, words) in [
            ("number = \"hunter2, expected hunter2\"", "line 1: invalid type, expected u8"),
            ("word = \"\"\"a, expected hunter2\n\"\"\"", "line 1: unknown variant, expected `one` or `two`"),
            ("\nword = \"hunter2\"", "line 2: unknown variant, expected `one` or `two`"),
            ("HUNTER2 = 1", "line 1: unknown field, expected `number` or `word`"),
            ("nummer = 1", "line 1: unknown field `nummer`, expected `number` or `word`"),
            ("number = 1\nword = \"hunter2", "line 2: "),
            ("hunter2", "line 1: "),
            ("number = hunter2", "line 1: "),
            ("hunter2 = 1\nhunter2 = 2", "line 2: "),
        ] {
            let found = toml(text, &toml::from_str::<Schema>(text).expect_err(text));
            assert!(found.starts_with(words) && !found.to_lowercase().contains("hunter2"), "{text}: {found}");
        }
    }

    #[test]
    fn json_errors_say_where_and_quote_nothing() {
        for (text, words) in [
            ("{\"number\": \"hunter2 at line 9\"}", "line 1, column "),
            ("{\"number\": \"a, expected hunter2 at line 9\"}", "line 1, column 42: invalid type, expected u8"),
            ("{\"word\": \"a, expected hunter2\\n\"}", "line 1, column "),
            ("{\"word\": \"a`, expected hunter2 at line 9 column 9\\n\"}", "line 1, column "),
            ("{\"word\":\n\"hunter2\"}", "line 2, column 9: unknown variant, expected `one` or `two`"),
            ("{\"HUNTER2\": 1}", "line 1, column "),
            ("hunter2", "line 1, column 1: it is not valid JSON"),
            ("{", "line 1, column 1: it ends too early"),
        ] {
            let found = json(&serde_json::from_str::<Schema>(text).expect_err(text));
            assert!(found.starts_with(words) && !found.to_lowercase().contains("hunter2"), "{text}: {found}");
        }
    }

    #[test]
    fn yaml_errors_say_where_and_quote_nothing() {
        for wrong in ["user:\n  token: hunter2\n\ta: b\n", "token: hunter2\ntoken: hunter2\n", "{hunter2: [hunter2"] {
            let error = serde_saphyr::from_str::<serde_json::Value>(wrong).expect_err("it is wrong");
            let words = yaml(&error);
            assert!(words.starts_with("line ") && !words.contains("hunter2") && !words.contains('\n'), "{words}");
        }
    }
}
