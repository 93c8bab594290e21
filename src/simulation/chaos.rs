//! Everything that goes wrong around the nodes, at random times, and that ends again.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use pintle_plugins_api::{BackendErrorKind, KeyId};

use super::control_plane::{Approver, Server, Signer};
use super::device::Condition;
use super::node::{CURRENT, JOURNAL};
use super::world::{DiskTrouble, HOUR, World};

const DAY: Duration = Duration::from_secs(86_400);

/// What the simulation itself has to do, beyond the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// The process of this node is killed; with the power, if so.
    Kill { node: usize, power: bool },
    /// An operator asks this node for a rotation.
    Rotate(usize),
    /// An operator moves this node's key to its other backend.
    Migrate(usize),
    /// The process of this node is started anew with its other backend configured.
    Reconfigure(usize),
}

/// Does one thing to the world, or asks for one that only the simulation can do.
pub(super) fn strike(world: &Arc<World>, nodes: usize) -> Option<Order> {
    let mut inner = world.lock();
    let inner = &mut *inner;
    let node = usize::try_from(inner.random.below(nodes as u64)).unwrap_or_default();
    let choice = inner.random.below(20);
    match choice {
        0 | 1 => {
            use Server::*;
            let all = [Down, Silent, Throttles, Fails, Unauthorized, Forbidden, Garbage, DropsWatches, Stale];
            inner.control_plane.server = *inner.random.one_of(&all);
            let server = inner.control_plane.server;
            inner.visit(format!("API server becomes {server:?}"));
        }
        2 => {
            inner.control_plane.approver = *inner.random.one_of(&[Approver::Denies, Approver::Absent]);
            let approver = inner.control_plane.approver;
            inner.visit(format!("approver becomes {approver:?}"));
        }
        3 | 4 => {
            use Signer::*;
            let all = [Absent, Fails, WrongKey, WrongSubject, NotYetValid, AlreadyExpired, Garbage];
            inner.control_plane.signer = *inner.random.one_of(&all);
            let signer = inner.control_plane.signer;
            inner.visit(format!("signer becomes {signer:?}"));
        }
        5 => {
            // The signer's authority alone changes, or the API server's with it.
            inner.control_plane.signing = 1 - inner.control_plane.signing;
            if inner.random.one_in(2) {
                inner.control_plane.trusted = [inner.control_plane.signing].into();
                inner.visit("authority replaced");
            } else {
                inner.visit("signer's authority replaced");
            }
        }
        6 => {
            inner.control_plane.life = *inner.random.one_of(&[HOUR, HOUR * 12, DAY * 10, DAY * 90, DAY * 365]);
            inner.visit("lives become others");
        }
        7 | 8 => {
            let all = [
                Condition::Slow(Duration::from_secs(15)),
                Condition::Slow(Duration::from_secs(60)),
                Condition::Hangs,
                Condition::Fails(BackendErrorKind::Unavailable),
                Condition::Fails(BackendErrorKind::Locked),
                Condition::Fails(BackendErrorKind::Corrupt),
                Condition::DestroysNothing,
            ];
            let condition = *inner.random.one_of(&all);
            let device = &inner.nodes[node].devices[usize::from(inner.random.one_in(2))];
            device.device.lock().unwrap_or_else(PoisonError::into_inner).condition = condition;
            inner.visit(format!("device {condition:?}"));
        }
        9 => {
            let device = &inner.nodes[node].devices[usize::from(inner.random.one_in(2))];
            device.device.lock().unwrap_or_else(PoisonError::into_inner).keys.clear();
            inner.visit("device cleared");
        }
        10 => {
            // Somebody else's keys have the ids that come next.
            let device = &inner.nodes[node].devices[1];
            let mut device = device.device.lock().unwrap_or_else(PoisonError::into_inner);
            for number in 0..40 {
                let id = KeyId::new(format!("node-{node}_client_{number}")).expect("an id");
                if !device.keys.contains_key(&id) {
                    device.make(id, None);
                }
            }
            drop(device);
            inner.visit("somebody else's keys");
        }
        11 | 12 => {
            let all = [DiskTrouble::Full, DiskTrouble::Broken, DiskTrouble::ReadOnly];
            inner.nodes[node].disk_trouble = *inner.random.one_of(&all);
            let trouble = inner.nodes[node].disk_trouble;
            inner.visit(format!("disk {trouble:?}"));
        }
        13 => {
            let disk = inner.nodes[node].disk.clone();
            let pairs = disk.names(Path::new("/pki"), "kubelet-client-");
            let what = inner.random.below(6);
            match what {
                0 => disk.take_away(Path::new(CURRENT)),
                1 => pairs.iter().for_each(|pair| disk.take_away(pair)),
                2 => disk.put_link(Path::new(CURRENT), Path::new("nowhere.pem")),
                3 => disk.put_link(Path::new(CURRENT), Path::new("kubelet-client-current.pem")),
                4 => pairs.iter().filter(|pair| *pair != Path::new(CURRENT)).for_each(|pair| disk.put(pair, b"")),
                _ => disk.put(Path::new(JOURNAL), &[0; 200]),
            }
            inner.visit(format!("somebody tampers with the disk, {what}"));
        }
        14 => {
            let far = *inner.random.one_of(&[2_000_i64, 120_000, 7_200_000, 86_400_000 * 40, 86_400_000 * 800]);
            let off = if inner.random.one_in(2) { far } else { -far };
            inner.nodes[node].clock_off.store(off, Ordering::Relaxed);
            inner.visit(format!("clock off by {} s", off / 1000));
        }
        15 => {
            inner.control_plane.delete_requests();
            inner.visit("requests deleted");
        }
        16 => {
            inner.control_plane.bootstrap_accepted = false;
            inner.visit("bootstrap credential refused");
        }
        17 => {
            let power = inner.random.one_in(2);
            inner.visit(if power { "power goes" } else { "process killed" });
            return Some(Order::Kill { node, power });
        }
        18 => {
            let migrates = inner.random.one_in(2);
            inner.visit(if migrates { "operator migrates" } else { "operator rotates" });
            return Some(if migrates { Order::Migrate(node) } else { Order::Rotate(node) });
        }
        _ => {
            inner.visit("configuration changed");
            return Some(Order::Reconfigure(node));
        }
    }
    None
}

/// Ends everything that is wrong and can end by itself.
pub(super) fn calm(world: &Arc<World>) {
    let mut inner = world.lock();
    let inner = &mut *inner;
    inner.control_plane.server = Server::Answers;
    inner.control_plane.approver = Approver::Approves;
    inner.control_plane.signer = Signer::Signs;
    inner.control_plane.bootstrap_accepted = true;
    let signing = inner.control_plane.signing;
    inner.control_plane.trusted.insert(signing);
    for node in &mut inner.nodes {
        node.clock_off.store(0, Ordering::Relaxed);
        node.disk_trouble = DiskTrouble::None;
        for device in &node.devices {
            device.device.lock().unwrap_or_else(PoisonError::into_inner).condition = Condition::Works;
        }
    }
}
