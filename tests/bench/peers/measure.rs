//! The measurements and their order.

use std::time::Duration;

use crate::load::{self, Direction, ProxyAddress};
use crate::peers::Proxy;
use crate::table::{Goal, PINTLE_HYBRID, PINTLE_TOKEN, Table};

/// How much to measure.
#[derive(Clone, Copy)]
pub(crate) struct Workload {
    rounds: usize,
    /// New connections per proxy and round.
    connections: usize,
    /// Bytes in each direction.
    volume: usize,
    requests: usize,
}

impl Workload {
    /// About eight minutes.
    pub(crate) const FULL: Self = Self { rounds: 5, connections: 2000, volume: 800_000_000, requests: 6000 };
    /// About three minutes.
    pub(crate) const QUICK: Self = Self { rounds: 3, connections: 1000, volume: 250_000_000, requests: 3000 };
}

/// New connections opened in parallel.
const CONNECTIONS_AT_ONCE: usize = 16;
/// Connections with requests in parallel. With more than one, requests wait for each other's turn on the CPU, which
/// would then be what is measured.
const REQUESTS_AT_ONCE: usize = 1;
/// Open and idle connections when memory is measured.
const OPEN_CONNECTIONS: usize = 1000;
/// How long a proxy may be busy starting.
const STARTUP_TIME: Duration = Duration::from_secs(2);
/// How long a proxy may finish its work before its CPU time is read.
const SETTLE_TIME: Duration = Duration::from_millis(100);

const CONNECTION_CPU: Goal = Goal::lower(0.6);
const CONNECTION_RATE: Goal = Goal { in_token: Some(0.9), ..Goal::higher(1.2) };
const VOLUME_CPU: Goal = Goal::lower(0.8);
const LOWER_IS_BETTER: Goal = Goal::lower(1.0);
const HIGHER_IS_BETTER: Goal = Goal::higher(1.0);

pub(crate) struct Measurement {
    workload: Workload,
    table: Table,
}

impl Measurement {
    pub(crate) fn new(workload: Workload) -> Self {
        Self { workload, table: Table::default() }
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// Measures the memory of a proxy that has just been started.
    pub(crate) async fn memory_of(&mut self, proxy: &Proxy) {
        tokio::time::sleep(STARTUP_TIME).await;
        self.memory(["idle, RSS MiB", "idle, PSS MiB", "idle, anonymous MiB"], proxy);
        let over_unix =
            ["1,000 open over unix, RSS MiB", "1,000 open over unix, PSS MiB", "1,000 open over unix, anon. MiB"];
        let over_tls =
            ["1,000 open over TLS, RSS MiB", "1,000 open over TLS, PSS MiB", "1,000 open over TLS, anon. MiB"];
        for (address, titles) in [(Some(&proxy.unix), over_unix), (proxy.tls.as_ref(), over_tls)] {
            let Some(address) = address else { continue };
            let open = load::open(address, OPEN_CONNECTIONS).await;
            let open = open.unwrap_or_else(|error| panic!("open connections through {}: {error}", proxy.name));
            self.memory(titles, proxy);
            drop(open);
        }
    }

    /// Measures everything else, one proxy after the other in each round.
    pub(crate) async fn rounds(&mut self, proxies: &[Proxy]) {
        for round in 0..self.workload.rounds {
            eprintln!("round {} of {}", round + 1, self.workload.rounds);
            for over_tls in [true, false] {
                let group = if over_tls { "TLS in, mutual TLS out" } else { "unix socket in, mutual TLS out" };
                // Rotates the order, so that no proxy always runs first or after the same one.
                let (later, first) = proxies.split_at(round % proxies.len());
                let turns = first.iter().chain(later);
                let entrances: Vec<_> = turns
                    .filter_map(|proxy| Some((proxy, if over_tls { proxy.tls.as_ref()? } else { &proxy.unix })))
                    .collect();
                for (proxy, address) in &entrances {
                    self.connections(group, proxy, address).await;
                }
                for (proxy, address) in &entrances {
                    self.requests(group, proxy, address).await;
                }
                // The key's location and the key exchange make no difference to copying.
                let copying = |proxy: &Proxy| proxy.name != PINTLE_TOKEN && proxy.name != PINTLE_HYBRID;
                for (proxy, address) in entrances.iter().filter(|(proxy, _)| copying(proxy)) {
                    self.volume(group, proxy, address).await;
                }
            }
        }
        for proxy in proxies {
            self.memory(
                ["after all rounds, RSS MiB", "after all rounds, PSS MiB", "after all rounds, anon. MiB"],
                proxy,
            );
        }
    }

    async fn connections(&mut self, group: &str, proxy: &Proxy, address: &ProxyAddress) {
        let count = self.workload.connections;
        let failed = |error: std::io::Error| panic!("new connections through {}: {error}", proxy.name);
        // Warm up: initialize whatever is created once.
        load::connections(address, CONNECTIONS_AT_ONCE, CONNECTIONS_AT_ONCE).await.unwrap_or_else(failed);
        tokio::time::sleep(SETTLE_TIME).await;
        let before = proxy.process.cpu();
        let time = load::connections(address, count, CONNECTIONS_AT_ONCE).await.unwrap_or_else(failed);
        tokio::time::sleep(SETTLE_TIME).await;
        let cpu = proxy.process.cpu() - before;
        let thousands = count as f64 / 1000.0;
        self.table.add(
            group,
            "CPU ms / 1,000 new connections",
            CONNECTION_CPU,
            proxy.name,
            milliseconds(cpu) / thousands,
        );
        self.table.add(group, "new connections / s", CONNECTION_RATE, proxy.name, count as f64 / time.as_secs_f64());
    }

    async fn requests(&mut self, group: &str, proxy: &Proxy, address: &ProxyAddress) {
        let failed = |error: std::io::Error| panic!("requests through {}: {error}", proxy.name);
        let connections = load::open(address, REQUESTS_AT_ONCE).await.unwrap_or_else(failed);
        let before = proxy.process.cpu();
        let times = load::requests(connections, self.workload.requests).await;
        let cpu = proxy.process.cpu() - before;
        let times = times.unwrap_or_else(|error| panic!("requests through {}: {error}", proxy.name));
        let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e6;
        let thousands = times.len() as f64 / 1000.0;
        self.table.add(group, "request latency p50, µs", LOWER_IS_BETTER, proxy.name, at(50));
        self.table.add(group, "request latency p99, µs", LOWER_IS_BETTER, proxy.name, at(99));
        self.table.add(group, "CPU ms / 1,000 requests", LOWER_IS_BETTER, proxy.name, milliseconds(cpu) / thousands);
    }

    async fn volume(&mut self, group: &str, proxy: &Proxy, address: &ProxyAddress) {
        let failed =
            |error: std::io::Error| -> Vec<load::Connection> { panic!("bytes through {}: {error}", proxy.name) };
        let ways = [
            (Direction::ToClient, 1, "CPU ms / GB to client, 1 conn.", "GB / s to client, 1 conn."),
            (Direction::ToClient, 4, "CPU ms / GB to client, 4 conn.", "GB / s to client, 4 conn."),
            (Direction::ToServer, 1, "CPU ms / GB to server, 1 conn.", "GB / s to server, 1 conn."),
            (Direction::ToServer, 4, "CPU ms / GB to server, 4 conn.", "GB / s to server, 4 conn."),
        ];
        for (direction, count, cpu_title, rate_title) in ways {
            let mut connections = load::open(address, count).await.unwrap_or_else(failed);
            let before = proxy.process.cpu();
            let time = load::transfer(&mut connections, self.workload.volume, direction).await;
            let time = time.unwrap_or_else(|error| panic!("bytes through {}: {error}", proxy.name));
            let cpu = proxy.process.cpu() - before;
            let gigabytes = self.workload.volume as f64 / 1e9;
            self.table.add(group, cpu_title, VOLUME_CPU, proxy.name, milliseconds(cpu) / gigabytes);
            self.table.add(group, rate_title, HIGHER_IS_BETTER, proxy.name, gigabytes / time.as_secs_f64());
        }
    }

    fn memory(&mut self, titles: [&'static str; 3], proxy: &Proxy) {
        let memory = proxy.process.memory();
        for (title, figure) in titles.into_iter().zip([memory.resident, memory.proportional, memory.anonymous]) {
            self.table.add("memory", title, LOWER_IS_BETTER, proxy.name, figure);
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
