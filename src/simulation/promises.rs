//! What pintle promises, checked whenever anything has happened.

use std::path::Path;
use std::sync::PoisonError;

use pintle_agent_core::UnixTime;
use pintle_agent_core::issued::Leaf;

use super::node::{CURRENT, JOURNAL, Node};
use super::world::{HOUR, World};

/// No more requests of one node within an hour than this: exponential back-off begins at once and grows to ten minutes,
/// and each key that is lost, each command and each restart begins it anew.
const REQUESTS_AN_HOUR: usize = 60;

/// What stood on a node's disk when it was looked at last.
#[derive(Clone, Default, PartialEq)]
pub(super) struct Seen {
    current: Option<Vec<u8>>,
}

/// Checks the promises about one node; `by_agent` if its own process has just acted, and nobody else.
pub(super) fn check(world: &World, node: &Node, seen: &mut Seen, by_agent: bool) {
    let now = world.true_time();
    let mut inner = world.lock();
    let disk = inner.nodes[node.number].disk.clone();
    let current = disk.peek(Path::new(CURRENT));
    if current != seen.current {
        if by_agent && is_good(&inner, seen.current.as_deref(), now) && !is_good(&inner, current.as_deref(), now) {
            let (was, is) = (seen.current.as_deref().and_then(leaf), current.as_deref().and_then(leaf));
            let state = disk.peek(Path::new(JOURNAL)).map(|journal| String::from_utf8_lossy(&journal).into_owned());
            let state = state.unwrap_or_default();
            let phase = state.find("\"phase\": {").map_or("", |at| &state[at..(at + 60).min(state.len())]);
            let detail = format!("{}: {was:?} became {is:?} in {phase}", node.config.node.name);
            inner.break_promise("the pair in use stays good", detail);
        }
        seen.current = current;
    }
    check_keys(&mut inner, node, now);
    let name = format!("system:node:{}", node.config.node.name);
    inner.control_plane.created.retain(|(_, at)| now.since(*at) < HOUR);
    let requests = inner.control_plane.created.iter().filter(|(subject, _)| *subject == name).count();
    if requests > REQUESTS_AN_HOUR {
        inner.break_promise("requests are bounded", format!("{requests} of {name} within an hour"));
    }
}

/// No key in use is destroyed, nor one that another node made; none is made that is not journalled durably.
fn check_keys(inner: &mut super::world::Inner, node: &Node, now: UnixTime) {
    let devices = inner.nodes[node.number].devices.clone();
    for device in devices {
        let (destroyed, made) = {
            let mut device = device.device.lock().unwrap_or_else(PoisonError::into_inner);
            (std::mem::take(&mut device.destroyed), std::mem::take(&mut device.fresh))
        };
        for (id, by) in made {
            let journal = inner.nodes[by].disk.peek_durable(Path::new(JOURNAL)).unwrap_or_default();
            if !String::from_utf8_lossy(&journal).contains(&id.to_string()) {
                inner.break_promise("what is not journalled is not done", format!("key {id}"));
            }
        }
        for (id, key, by) in destroyed {
            if key.maker != Some(by) {
                inner.break_promise("only own keys are destroyed", format!("{id} of {:?} by {by}", key.maker));
            }
            for number in 0..inner.nodes.len() {
                let current = inner.nodes[number].disk.peek(Path::new(CURRENT));
                let in_use = current.as_deref().and_then(leaf).is_some_and(|leaf| {
                    leaf.public_key == key.public_key.as_der() && is_good(inner, current.as_deref(), now)
                });
                if in_use {
                    inner.break_promise("no key in use is destroyed", format!("{id} of node {number}"));
                }
            }
        }
    }
}

fn leaf(pair: &[u8]) -> Option<Leaf> {
    Leaf::of(&String::from_utf8_lossy(pair)).ok()
}

/// Whether the API server accepts the certificate in this pair now.
fn is_good(inner: &super::world::Inner, pair: Option<&[u8]>, now: UnixTime) -> bool {
    let Some(leaf) = pair.and_then(leaf) else { return false };
    inner.control_plane.issued.get(&leaf.fingerprint).is_some_and(|issued| {
        inner.control_plane.trusted.contains(&issued.authority) && issued.not_before <= now && now < issued.not_after
    })
}
