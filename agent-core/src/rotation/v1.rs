//! The state as versions before 0.2 journalled it.

use pintle_plugins_api::PublicKey;
use serde::Deserialize;

use super::{BackOff, Candidate, Phase, State, SubmittedRequest};
use crate::{Credential, KeyName, Template};

/// The state in a journal of version 1.
#[derive(Deserialize)]
pub struct StateV1 {
    held: Option<Credential>,
    phase: PhaseV1,
    last_slot: u64,
    back_off: Option<BackOff>,
    held_refused: bool,
    held_key_lost: bool,
    rotation_requested: bool,
    discarded: u32,
    #[serde(default)]
    proof_refusals: u32,
    retiring: Vec<KeyName>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PhaseV1 {
    Holding,
    Generating { key: KeyName },
    Requesting { next: CandidateV1 },
    Awaiting { next: CandidateV1, request: SubmittedRequest },
    Publishing { next: CandidateV1, issued: Credential },
    Proving,
    Retiring,
}

#[derive(Deserialize)]
struct CandidateV1 {
    key: KeyName,
    public_key: PublicKey,
    attempt: u32,
}

impl StateV1 {
    /// The same state as of now. `template` is what was asked for: version 1 asked for what was configured.
    pub fn upgraded(self, template: &Template) -> State {
        let candidate = |CandidateV1 { key, public_key, attempt }| {
            let template = template.clone();
            Candidate { key, public_key, template, attempt }
        };
        let held_unproven = matches!(self.phase, PhaseV1::Proving);
        let phase = match self.phase {
            PhaseV1::Holding => Phase::Holding,
            PhaseV1::Generating { key } => Phase::Generating { key },
            PhaseV1::Requesting { next } => Phase::Requesting { next: candidate(next) },
            PhaseV1::Awaiting { next, request } => Phase::Awaiting { next: candidate(next), request },
            // It is perhaps written, and version 1 never proved before that.
            PhaseV1::Publishing { next, issued } => Phase::Publishing { next: candidate(next), issued, proven: false },
            PhaseV1::Proving => Phase::Retiring { attempted: false, refusals: self.proof_refusals },
            PhaseV1::Retiring => Phase::RETIRING,
        };
        State {
            held_template: self.held.as_ref().map(|_| template.clone()),
            held: self.held,
            held_unproven,
            held_refused: self.held_refused,
            held_key_lost: self.held_key_lost,
            phase,
            last_slot: self.last_slot,
            back_off: self.back_off,
            rotation_requested: self.rotation_requested,
            discarded: self.discarded,
            retiring: self.retiring,
            ..State::default()
        }
    }
}
