//! What is measured, and in which order.

use std::time::Duration;

use crate::load::{self, Direction, Entrance};
use crate::peers::Proxy;
use crate::table::{Aim, PINTLE_HYBRID, PINTLE_TOKEN, Table};

/// How much is measured.
#[derive(Clone, Copy)]
pub(crate) struct Extent {
    rounds: usize,
    /// New connections, for each proxy and round.
    connections: usize,
    /// Octets, each way.
    volume: usize,
    /// Requests.
    requests: usize,
}

impl Extent {
    /// Some eight minutes.
    pub(crate) const FULL: Self = Self { rounds: 5, connections: 2000, volume: 800_000_000, requests: 6000 };
    /// Some three minutes.
    pub(crate) const QUICK: Self = Self { rounds: 3, connections: 1000, volume: 250_000_000, requests: 3000 };
}

/// New connections that are under way at once.
const CONNECTIONS_AT_ONCE: usize = 16;
/// Connections that have requests under way at once: with more than one, a request waits for another one's turn on the
/// same processor, and that is what would be measured.
const REQUESTS_AT_ONCE: usize = 1;
/// Connections that are open and idle when the memory in use is read.
const OPEN_CONNECTIONS: usize = 1000;
/// How long a proxy may be busy with its own start.
const STARTING: Duration = Duration::from_secs(2);
/// How long a proxy may go on with what it has been given before its time is read.
const SETTLING: Duration = Duration::from_millis(100);

const CONNECTION_CPU: Aim = Aim::lower(0.6);
const CONNECTION_RATE: Aim = Aim { in_token: Some(0.9), ..Aim::higher(1.2) };
const VOLUME_CPU: Aim = Aim::lower(0.8);
const LEAD_LOW: Aim = Aim::lower(1.0);
const LEAD_HIGH: Aim = Aim::higher(1.0);

/// A measurement under way.
pub(crate) struct Measurement {
    extent: Extent,
    table: Table,
}

impl Measurement {
    pub(crate) fn new(extent: Extent) -> Self {
        Self { extent, table: Table::default() }
    }

    /// What was measured.
    pub(crate) fn table(&self) -> &Table {
        &self.table
    }

    /// The memory of a proxy that has just been started.
    pub(crate) async fn memory_of(&mut self, proxy: &Proxy) {
        tokio::time::sleep(STARTING).await;
        self.memory(["idle, RSS MiB", "idle, PSS MiB", "idle, anonymous MiB"], proxy);
        let over_unix =
            ["1,000 open over unix, RSS MiB", "1,000 open over unix, PSS MiB", "1,000 open over unix, anon. MiB"];
        let over_tls =
            ["1,000 open over TLS, RSS MiB", "1,000 open over TLS, PSS MiB", "1,000 open over TLS, anon. MiB"];
        for (entrance, titles) in [(Some(&proxy.unix), over_unix), (proxy.tls.as_ref(), over_tls)] {
            let Some(entrance) = entrance else { continue };
            let open = load::open(entrance, OPEN_CONNECTIONS).await;
            let open = open.unwrap_or_else(|error| panic!("open connections through {}: {error}", proxy.name));
            self.memory(titles, proxy);
            drop(open);
        }
    }

    /// Everything else, one proxy after the other in each round.
    pub(crate) async fn rounds(&mut self, proxies: &[Proxy]) {
        for round in 0..self.extent.rounds {
            eprintln!("round {} of {}", round + 1, self.extent.rounds);
            for over_tls in [true, false] {
                let group = if over_tls { "TLS in, mutual TLS out" } else { "unix socket in, mutual TLS out" };
                // Nobody is always the first after somebody else.
                let (later, first) = proxies.split_at(round % proxies.len());
                let turns = first.iter().chain(later);
                let entrances: Vec<_> = turns
                    .filter_map(|proxy| Some((proxy, if over_tls { proxy.tls.as_ref()? } else { &proxy.unix })))
                    .collect();
                for (proxy, entrance) in &entrances {
                    self.connections(group, proxy, entrance).await;
                }
                for (proxy, entrance) in &entrances {
                    self.requests(group, proxy, entrance).await;
                }
                // With its key elsewhere, or another key exchange, a proxy copies no differently.
                let copying = |proxy: &Proxy| proxy.name != PINTLE_TOKEN && proxy.name != PINTLE_HYBRID;
                for (proxy, entrance) in entrances.iter().filter(|(proxy, _)| copying(proxy)) {
                    self.volume(group, proxy, entrance).await;
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

    async fn connections(&mut self, group: &str, proxy: &Proxy, entrance: &Entrance) {
        let count = self.extent.connections;
        let failed = |error: std::io::Error| panic!("new connections through {}: {error}", proxy.name);
        // Whatever is made once.
        load::connections(entrance, CONNECTIONS_AT_ONCE, CONNECTIONS_AT_ONCE).await.unwrap_or_else(failed);
        tokio::time::sleep(SETTLING).await;
        let before = proxy.process.cpu();
        let time = load::connections(entrance, count, CONNECTIONS_AT_ONCE).await.unwrap_or_else(failed);
        tokio::time::sleep(SETTLING).await;
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

    async fn requests(&mut self, group: &str, proxy: &Proxy, entrance: &Entrance) {
        let failed = |error: std::io::Error| panic!("requests through {}: {error}", proxy.name);
        let connections = load::open(entrance, REQUESTS_AT_ONCE).await.unwrap_or_else(failed);
        let before = proxy.process.cpu();
        let times = load::requests(connections, self.extent.requests).await;
        let cpu = proxy.process.cpu() - before;
        let times = times.unwrap_or_else(|error| panic!("requests through {}: {error}", proxy.name));
        let at = |percent: usize| times[times.len() * percent / 100].as_secs_f64() * 1e6;
        let thousands = times.len() as f64 / 1000.0;
        self.table.add(group, "request latency p50, µs", LEAD_LOW, proxy.name, at(50));
        self.table.add(group, "request latency p99, µs", LEAD_LOW, proxy.name, at(99));
        self.table.add(group, "CPU ms / 1,000 requests", LEAD_LOW, proxy.name, milliseconds(cpu) / thousands);
    }

    async fn volume(&mut self, group: &str, proxy: &Proxy, entrance: &Entrance) {
        let failed =
            |error: std::io::Error| -> Vec<load::Connection> { panic!("octets through {}: {error}", proxy.name) };
        let ways = [
            (Direction::ToClient, 1, "CPU ms / GB to client, 1 conn.", "GB / s to client, 1 conn."),
            (Direction::ToClient, 4, "CPU ms / GB to client, 4 conn.", "GB / s to client, 4 conn."),
            (Direction::ToServer, 1, "CPU ms / GB to server, 1 conn.", "GB / s to server, 1 conn."),
            (Direction::ToServer, 4, "CPU ms / GB to server, 4 conn.", "GB / s to server, 4 conn."),
        ];
        for (direction, count, cpu_title, rate_title) in ways {
            let mut connections = load::open(entrance, count).await.unwrap_or_else(failed);
            let before = proxy.process.cpu();
            let time = load::transfer(&mut connections, self.extent.volume, direction).await;
            let time = time.unwrap_or_else(|error| panic!("octets through {}: {error}", proxy.name));
            let cpu = proxy.process.cpu() - before;
            let gigabytes = self.extent.volume as f64 / 1e9;
            self.table.add(group, cpu_title, VOLUME_CPU, proxy.name, milliseconds(cpu) / gigabytes);
            self.table.add(group, rate_title, LEAD_HIGH, proxy.name, gigabytes / time.as_secs_f64());
        }
    }

    fn memory(&mut self, titles: [&'static str; 3], proxy: &Proxy) {
        let memory = proxy.process.memory();
        for (title, figure) in titles.into_iter().zip([memory.resident, memory.proportional, memory.anonymous]) {
            self.table.add("memory", title, LEAD_LOW, proxy.name, figure);
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
