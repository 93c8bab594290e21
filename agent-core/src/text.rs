//! Sanitizes untrusted text for terminals and logs.

/// The text with its control characters written out, as in `\n` and `\u{1b}`: what a cluster says must neither end a line
/// of a log, nor command a terminal, nor turn the direction in which it writes.
pub fn printable(text: &str) -> String {
    let commands = |character: char| {
        character.is_control() || matches!(character, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        if commands(character) { shown.extend(character.escape_default()) } else { shown.push(character) }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_written_out_and_the_rest_is_kept() {
        assert_eq!(printable("no\nREADY=1\u{1b}[2J\u{9b}\u{202e}"), "no\\nREADY=1\\u{1b}[2J\\u{9b}\\u{202e}");
        assert_eq!(printable("grüß \"c:\\x\""), "grüß \"c:\\x\"");
    }
}
