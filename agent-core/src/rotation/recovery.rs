//! The state at a start: what the journal says, and what was found on disk and in the backends.

use super::{FoundPair, Phase, State, held_refused};
use crate::{Policy, UnixTime};

/// What was found of the held credential.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// What the journal says: its pair is the current one, or can be written again from what it holds.
    AsJournalled,
    /// The current pair is the journal's, and the backend no longer has its key.
    KeyLost,
    /// Another good pair is the current one, or there is no journal.
    Pair(FoundPair),
    /// No pair that can be used, and the journal's credential has no key any more.
    Nothing,
}

impl State {
    /// The state to begin with. `installation` is for one that has none yet, see [`State::installation`].
    pub fn recovered(
        journalled: Option<Self>,
        installation: String,
        found: Found,
        now: UnixTime,
        policy: &Policy,
    ) -> Self {
        let mut state = journalled.unwrap_or_default();
        if state.installation.is_empty() {
            state.installation = installation;
        }
        match found {
            Found::AsJournalled => {}
            Found::KeyLost => held_refused(&mut state, true, now),
            Found::Pair(pair) => state.replace_pair(pair, now, policy),
            Found::Nothing => {
                if !state.restore_previous("the pair on disk and its key are gone", true, now) {
                    (state.held, state.held_template) = (None, None);
                    (state.held_refused, state.held_key_lost, state.held_unproven) = (false, false, false);
                    state.drop_previous();
                }
                // What was to be taken back is gone as well.
                if let (Phase::Restoring { dropped, .. }, None) = (state.phase.clone(), &state.held) {
                    state.enter(Phase::RETIRING);
                    state.retire_key(dropped.key().clone());
                }
            }
        }
        // An earlier version did not journal what it had asked for.
        if state.held.is_some() && state.held_template.is_none() {
            state.held_template.clone_from(&policy.template);
        }
        state
    }
}
