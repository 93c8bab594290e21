//! The whole agent in a simulated world: the very loop of an identity, over a simulated clock, disk, API server and
//! backends. A seed reproduces everything.
//!
//! `PINTLE_SIMULATED_NODE_YEARS=N cargo test -p pintle --lib simulation -- --nocapture` runs for longer;
//! `PINTLE_SIMULATED_SEED=N` runs one life alone, and prints what happens to it.

mod chaos;
mod control_plane;
mod device;
mod disk;
mod node;
mod promises;
mod random;
mod time;
mod world;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::identity::Command;
use crate::telemetry::State;
use chaos::Order;
use node::Node;
use promises::Seen;
use time::{Ended, Executor, Task};
use world::{BACKENDS, HOUR, World};

const DAY: Duration = Duration::from_secs(86_400);
/// The task that lets time pass; nodes have the numbers from 1.
const WEATHER: usize = 0;

/// What one life came to.
struct Life {
    visited: BTreeMap<String, u64>,
    node_years: f64,
}

/// Lets some nodes live for so long, and then waits for all of them to be ready.
fn live(seed: u64, span: Duration) -> Result<Life, String> {
    let mut shape = random::Random::new(seed ^ 0x5eed);
    let count = 1 + usize::try_from(shape.below(3)).unwrap_or_default();
    let life = *shape.one_of(&[HOUR, HOUR * 24, DAY * 30, DAY * 365]);
    let world = World::new(seed, count, life);
    let mut nodes: Vec<Node> = (0..count).map(|number| Node::new(&world, number)).collect();
    let mut seen = vec![Seen::default(); count];
    let mut executor = Executor::new(Arc::clone(&world.timers));
    for node in &mut nodes {
        executor.start(node.number + 1, node.process(&world));
    }
    world.lock().hostile = true;
    let end = u64::try_from(span.as_millis()).unwrap_or(u64::MAX);
    // First of all they enrol; then come blows, each followed by a calm now and then; at last a calm that is judged.
    let mut weather = Weather::Blow;
    executor.start(WEATHER, pause(&world, HOUR));
    world.stir();
    loop {
        // What the weather and the crashes have done is not the agents' doing.
        for (node, seen) in nodes.iter().zip(&mut seen) {
            promises::check(&world, node, seen, false);
        }
        let Some((number, ended)) = executor.run(|task| {
            for (node, seen) in nodes.iter().zip(&mut seen) {
                promises::check(&world, node, seen, task == node.number + 1);
            }
        }) else {
            return Err("nothing sleeps any more".to_owned());
        };
        if let Some(broken) = world.lock().broken.take() {
            return Err(broken);
        }
        if number != WEATHER {
            // A process that has ended is started again by the service manager.
            let node = &mut nodes[number - 1];
            let disk = world.lock().nodes[node.number].disk.clone();
            if ended == Ended::Crashed && world.lock().random.one_in(2) {
                disk.crash(&mut world.lock().random);
            } else {
                disk.process_ended();
            }
            executor.start(number, node.process(&world));
            continue;
        }
        weather = match weather {
            Weather::Blow if world.timers.now() > end => {
                chaos::calm(&world);
                world.lock().hostile = false;
                world.stir();
                executor.start(WEATHER, pause(&world, DAY * 2));
                Weather::Judged
            }
            Weather::Blow => {
                let order = chaos::strike(&world, count);
                if let Some(order) = order {
                    carry_out(order, &world, &mut nodes, &mut executor);
                }
                let (calms, wait) = {
                    let mut inner = world.lock();
                    (inner.random.one_in(3), inner.random.within(HOUR * 30))
                };
                if calms {
                    chaos::calm(&world);
                }
                world.stir();
                executor.start(WEATHER, pause(&world, wait));
                Weather::Blow
            }
            Weather::Judged => {
                for node in &nodes {
                    let status = node.status();
                    let ready = status.identities.iter().all(|identity| {
                        matches!(identity.state, State::Ready | State::Rotating) && identity.reason.is_empty()
                    });
                    if !ready || status.identities.is_empty() {
                        return Err(format!("liveness: {} is {:?}", node.config.node.name, status.identities));
                    }
                }
                let node_years = count as f64 * world.timers.now() as f64 / 31_557_600_000.0;
                return Ok(Life { visited: std::mem::take(&mut world.lock().visited), node_years });
            }
        };
    }
}

#[derive(Clone, Copy)]
enum Weather {
    Blow,
    Judged,
}

fn pause(world: &Arc<World>, duration: Duration) -> Task {
    let timers = Arc::clone(&world.timers);
    Task::new(async move { timers.sleep(duration).await })
}

fn carry_out(order: Order, world: &Arc<World>, nodes: &mut [Node], executor: &mut Executor) {
    match order {
        Order::Kill { node, power } => restart(world, &mut nodes[node], executor, power),
        Order::Rotate(node) => {
            let _ = nodes[node].commands.as_ref().map(|commands| commands.try_send(Command::Rotate));
        }
        Order::Migrate(node) => {
            let to = world.lock().random.one_of(&BACKENDS).to_string();
            let (reply, _) = tokio::sync::oneshot::channel();
            let command = Command::Migrate { to, dry_run: false, reply };
            let _ = nodes[node].commands.as_ref().map(|commands| commands.try_send(command));
        }
        Order::Reconfigure(node) => {
            let other = BACKENDS.into_iter().find(|name| *name != nodes[node].config.backend).unwrap_or(BACKENDS[0]);
            let config = &mut nodes[node].config;
            other.clone_into(&mut config.backend);
            other.clone_into(&mut config.configured_backend);
            restart(world, &mut nodes[node], executor, false);
        }
    }
}

fn restart(world: &Arc<World>, node: &mut Node, executor: &mut Executor, power: bool) {
    executor.stop(|number| number == node.number + 1);
    let disk = world.lock().nodes[node.number].disk.clone();
    if power {
        disk.crash(&mut world.lock().random);
    } else {
        disk.process_ended();
    }
    executor.start(node.number + 1, node.process(world));
}

/// What some lives came to.
#[derive(Default)]
struct Lives {
    number: u64,
    node_years: f64,
    visited: BTreeMap<String, u64>,
}

impl Lives {
    fn add(&mut self, other: Self) {
        self.number += other.number;
        self.node_years += other.node_years;
        other.visited.into_iter().for_each(|(what, times)| *self.visited.entry(what).or_default() += times);
    }
}

/// The seed of a life that went wrong, and how.
type Broken = (u64, String);

/// Runs lives on all cores until they add up to so many node-years.
fn lives(node_years: f64, span: Duration) -> Result<Lives, Broken> {
    let threads = std::thread::available_parallelism().map_or(2, usize::from) as u64;
    let work = |first: u64| -> Result<Lives, Broken> {
        let mut lives = Lives::default();
        let mut seeds = (first..).step_by(usize::try_from(threads).unwrap_or(1));
        while lives.node_years < node_years / threads as f64
            && let Some(seed) = seeds.next()
        {
            let life = live(seed, span).map_err(|broken| (seed, broken))?;
            lives.add(Lives { number: 1, node_years: life.node_years, visited: life.visited });
        }
        Ok(lives)
    };
    let results: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|first| scope.spawn(move || work(first))).collect();
        workers.into_iter().map(|worker| worker.join().expect("a life does not panic")).collect()
    });
    let mut total = Lives::default();
    for lives in results {
        total.add(lives?);
    }
    Ok(total)
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn every_life_keeps_the_promises_and_ends_ready() {
    if let Some(seed) = number("PINTLE_SIMULATED_SEED") {
        match live(seed, DAY * 60) {
            Ok(life) => println!("seed {seed}: {:.1} node-years", life.node_years),
            Err(broken) => panic!("seed {seed}: {broken}"),
        }
        return;
    }
    let node_years = number("PINTLE_SIMULATED_NODE_YEARS").unwrap_or(3);
    match lives(node_years as f64, DAY * 60) {
        Ok(Lives { number, node_years, visited }) => {
            println!("{number} lives, {node_years:.1} node-years; seen:");
            visited.iter().for_each(|(what, times)| println!("{times:>12} {what}"));
        }
        Err((seed, broken)) => panic!("seed {seed}: {broken}"),
    }
}
