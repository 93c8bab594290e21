//! The ids of an agent's keys.

/// The text with the installation left out of each key id: `worker-1_client_5e1f09ac_2` becomes `worker-1_client_2`. A
/// test does not know it before the agent has made it.
pub fn without_installation(text: &str) -> String {
    let parts: Vec<&str> = text.split('_').collect();
    let is_installation = |index: usize| {
        index > 0 && parts[index].len() == 8 && parts[index].chars().all(|digit| digit.is_ascii_hexdigit())
    };
    let kept = (0..parts.len()).filter(|index| !is_installation(*index)).map(|index| parts[index]);
    kept.collect::<Vec<_>>().join("_")
}
