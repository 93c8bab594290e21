//! Lives of an identity in a simulated world: seeded, with failing actions, crashes, an API server that is sometimes
//! down, keys that are lost, devices that die, authorities that are replaced, a configuration that changes, and a clock
//! that is sometimes wrong. Nothing here sleeps.

mod disturbances;
mod mutations;
mod promises;
mod world;

use std::time::Duration;

use pintle_plugins_api::KeyAlgorithm;

use super::*;
use crate::policy::KeyPrefix;
pub(super) use crate::policy::Window;
pub(super) use crate::{Credential, KeyName, Template};
pub(crate) use promises::Promise;
use promises::{Violation, broken};
use world::World;
pub(crate) use world::public_key;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(86_400);
/// Undisturbed for this long, no wait after a failure can still be in the way.
const RECOVERY: Duration = Duration::from_secs(4 * 3600);
/// A life that takes more steps than this for each rotation has come to a standstill.
const STEPS_OF_A_ROTATION: u64 = 1000;

pub(crate) fn policy() -> Policy {
    Policy {
        identity: "system:node:worker-1".to_owned(),
        key_prefix: KeyPrefix::new("worker-1", "client", "5e1f09ac"),
        backend: "simulated".to_owned(),
        algorithm: KeyAlgorithm::EcdsaP256,
        template: Some(template(0)),
        rotate: true,
        enrol_after_key_loss: true,
        back_off_base: Policy::BACK_OFF_BASE,
        back_off_cap: Policy::BACK_OFF_CAP,
    }
}

/// What is asked for once the configuration has changed this often.
pub(crate) fn template(number: u64) -> Template {
    let dns_names = if number == 0 { Vec::new() } else { vec![format!("name-{number}")] };
    Template { dns_names, ..Template::kubelet_client("worker-1") }
}

/// The steps under test, or a mutation of them.
type Step = fn(State, Event, UnixTime, &Policy) -> (State, Action);

/// SplitMix64: the whole of the world's randomness comes from the seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn one_in(&mut self, number: u64) -> bool {
        self.next().is_multiple_of(number)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn within(&mut self, longest: Duration) -> Duration {
        Duration::from_secs(self.below(longest.as_secs().max(1)))
    }
}

/// What a life, or many, came to.
#[derive(Clone, Copy, Debug, Default)]
struct Outcome {
    /// Steps of the longest life.
    steps: u64,
    /// The most requests within an hour.
    requests: usize,
}

/// Lives through `rotations` rotations and says how many steps that took, or what went wrong.
fn live(
    seed: u64,
    rotations: u64,
    step: Step,
    mut trace: impl FnMut(&World, &Event, &State),
) -> Result<Outcome, Violation> {
    let mut world = World::new(seed);
    let mut event = Event::Woke;
    // What is in memory is what is in the journal: a crash loses what happened after it was written, and no more.
    let mut state = State::new("5e1f09ac".to_owned());
    for steps in 0..rotations * STEPS_OF_A_ROTATION {
        trace(&world, &event, &state);
        world.note_event(&event, &state);
        let (next, action) = step(state, event, world.clock(), &world.policy);
        state = next;
        world.check_action(&state, &action)?;
        // A crash after the journal is written and before the action is performed, or after that and before the next
        // journal is written: then what happened is forgotten.
        let crash = world.random.below(40);
        event = Event::Woke;
        if crash != 0 {
            event = world.perform(&state, action)?;
        }
        world.check(&state)?;
        if crash < 2 {
            (state, event) = world.restart(state);
        }
        if world.rotations > rotations {
            return Ok(Outcome { steps, requests: world.most_requests });
        }
    }
    broken(Promise::Liveness, format!("no {rotations} rotations within {STEPS_OF_A_ROTATION} steps each"), &state)
}

/// Runs this many lives on all cores, and says what they came to; or the first seed that goes wrong, and how.
fn lives(number: u64, rotations: u64, step: Step) -> Result<Outcome, (u64, Violation)> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from) as u64;
    let results: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|worker| {
                scope.spawn(move || {
                    (worker..number).step_by(threads as usize).try_fold(Outcome::default(), |all, seed| {
                        let one = live(seed, rotations, step, |_, _, _| {}).map_err(|violation| (seed, violation))?;
                        Ok(Outcome { steps: all.steps.max(one.steps), requests: all.requests.max(one.requests) })
                    })
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().expect("a life does not panic")).collect()
    });
    match results.iter().filter_map(|result| result.as_ref().err()).min_by_key(|(seed, _)| *seed) {
        Some(first) => Err(first.clone()),
        None => Ok(results.into_iter().flatten().fold(Outcome::default(), |all, one| Outcome {
            steps: all.steps.max(one.steps),
            requests: all.requests.max(one.requests),
        })),
    }
}

/// `PINTLE_SIMULATED_SEED=N cargo test -p pintle-agent-core replay -- --nocapture` prints every step of a life.
#[test]
fn replay() {
    let Some(seed) = std::env::var("PINTLE_SIMULATED_SEED").ok().and_then(|seed| seed.parse().ok()) else {
        return;
    };
    let result = live(seed, 20, step, |world, event, state| {
        let waited = state.failures();
        println!("{world:?} {event:?} in {:?} after {waited} failures, held {:?}", state.phase, state.held);
    });
    println!("{result:?}");
}

/// Cases C01, C03, C05, C06, C07, C21, C26, C28, C31, C32, C33, C34 and C50, in every order.
#[test]
fn a_hundred_thousand_lives_of_twenty_rotations_keep_the_promises() {
    let number = std::env::var("PINTLE_SIMULATED_LIVES").ok().and_then(|number| number.parse().ok()).unwrap_or(100_000);
    match lives(number, 20, step) {
        Ok(outcome) => println!("{outcome:?}"),
        Err((seed, violation)) => panic!("seed {seed}: {violation}"),
    }
}
