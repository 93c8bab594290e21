//! pintle's credential proxy beside those that people use instead: `tests/bench/proxy`.
//!
//! Every proxy does the same: it takes a local connection, over TLS with a client certificate or over a unix socket, and
//! opens one to the common server as the node, with the same key and certificate. What it costs is read from the time
//! that its own processes have spent on a processor, which is the steadiest figure on a machine that does other things
//! too. The proxies take turns within each round, and ratios are taken within a round. Nothing is asserted.

mod agent;
mod authority;
mod exact;
mod load;
mod measure;
mod peers;
mod process;
mod server;
mod table;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;

use agent::{Agent, Identity, LocalSide, Token};
use authority::Authority;
use measure::{Extent, Measurement};
use peers::{Job, Proxy};
use server::KeyExchange;
use table::{GENERAL, PINTLE, PINTLE_HYBRID, PINTLE_OTHER, PINTLE_TOKEN};

/// Set in the process that measures: SoftHSM2 reads where its token is from the environment, so that is set first.
const DIRECTORY: &str = "PINTLE_BENCH_DIRECTORY";
/// Where ghostunnel is.
const GHOSTUNNEL: &str = "PINTLE_BENCH_GHOSTUNNEL";
/// Where another pintle is, such as that of before a change: it gets a column too.
const OTHER: &str = "PINTLE_BENCH_OTHER";

fn main() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else {
        let directory = tempfile::tempdir().expect("a directory");
        // The workers of a proxy that was started as root may be somebody else.
        std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .expect("its mode");
        let status = Command::new(std::env::current_exe().expect("this program"))
            .args(std::env::args_os().skip(1))
            .env(DIRECTORY, directory.path())
            .env("SOFTHSM2_CONF", directory.path().join("softhsm2.conf"))
            .status()
            .expect("this program starts again");
        drop(directory);
        std::process::exit(status.code().unwrap_or(1));
    };
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let extent = if arguments.iter().any(|argument| argument == "--quick") { Extent::QUICK } else { Extent::FULL };
    let only: Vec<_> = arguments.iter().filter(|argument| !argument.starts_with("--")).collect();
    let mut recipes = recipes(&directory);
    recipes.retain(|(name, _)| only.is_empty() || only.iter().any(|one| one == name));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let mut measurement = Measurement::new(extent);
    // One at a time, so that none shares the pages of a library with another.
    for (name, start) in &recipes {
        match start() {
            Some(proxy) => runtime.block_on(measurement.memory_of(&proxy)),
            None => println!("left out: {name}, which is not installed"),
        }
    }
    let proxies: Vec<_> = recipes.iter().filter_map(|(_, start)| start()).collect();
    runtime.block_on(measurement.rounds(&proxies));
    println!("{}", measurement.table().print());
    println!("{NOTES}");
}

const NOTES: &str = "\
Medians. CPU is that of the proxy's own processes. The ratio is pintle's to the best of nginx, haproxy and stunnel, within
a round. Everybody speaks TLS 1.3 with P-256 certificates, X25519 and AES-128-GCM, and resumes nothing. stunnel and
ghostunnel have TLS on one side only, so they are not in the first half. `SoftHSM2` is pintle with its key in a token,
whose module runs in a process of its own that is counted; `hybrid` is pintle with a server that agrees on keys by
X25519MLKEM768, which the others' TLS library does not know. Memory is that of all processes of a proxy that runs alone:
resident (RSS), with shared pages divided among those that share them (PSS), and what is no file's (anonymous); after all
rounds the others run too, and PSS flatters those that share a library.";

/// A name, and what starts the proxy, if it is installed.
type Recipe = (&'static str, Box<dyn Fn() -> Option<Proxy>>);

/// How each proxy is started, as often as one likes.
fn recipes(directory: &Path) -> Vec<Recipe> {
    let authority = Authority::new();
    let (server, node) = (authority.server(), Rc::new(authority.node()));
    let token = Token::new(directory, &authority);
    let mut clients = vec![node.certificate.clone()];
    clients.extend(token.iter().map(|token| token.identity().certificate.clone()));
    let classic = server::start(&server, clients.clone(), KeyExchange::Classic);
    let hybrid = server::start(&server, clients, KeyExchange::Hybrid);

    let authority_file = directory.join("ca.crt");
    std::fs::write(&authority_file, authority.pem()).expect("a file");
    let local = LocalSide(directory.join("run"));
    let agent = |name, program: PathBuf, server, identity: Identity| {
        let agent =
            Agent::new(name, &program, directory, local.clone(), (authority_file.clone(), server), identity.clone());
        (name, Box::new(move || Some(agent.start())) as Box<dyn Fn() -> Option<Proxy>>)
    };
    let program = || PathBuf::from(env!("CARGO_BIN_EXE_pintle"));
    let mut own = vec![agent(PINTLE, program(), classic, Identity::File(Rc::clone(&node)))];
    match token {
        Some(token) => own.push(agent(PINTLE_TOKEN, program(), classic, Identity::Token(Rc::new(token)))),
        None => println!("left out: pintle with SoftHSM2, which is not installed"),
    }
    own.push(agent(PINTLE_HYBRID, program(), hybrid, Identity::File(Rc::clone(&node))));
    if let Some(other) = std::env::var_os(OTHER) {
        own.push(agent(PINTLE_OTHER, other.into(), classic, Identity::File(Rc::clone(&node))));
    }

    // The first one makes the local certificates for everybody.
    drop(own[0].1());
    let (certificate, key) = node.write(directory);
    let local_pair = directory.join("local.pem");
    local.write_pair(&local_pair);
    let job = Rc::new(Job {
        directory: directory.to_owned(),
        server: classic,
        authority: authority_file,
        certificate,
        key,
        local_pair,
        local_authority: local.authority(),
        client: local.client(),
    });
    let ghostunnel = std::env::var_os(GHOSTUNNEL).map(PathBuf::from).unwrap_or_default();
    let peer = |name, start: fn(&Job) -> Option<Proxy>| -> Recipe {
        let job = Rc::clone(&job);
        (name, Box::new(move || start(&job)))
    };
    let mut recipes = vec![
        peer(GENERAL[0], peers::nginx),
        peer(GENERAL[1], peers::haproxy),
        peer(GENERAL[2], peers::stunnel),
        (table::GHOSTUNNEL, Box::new(move || peers::ghostunnel(&job, &ghostunnel))),
    ];
    recipes.append(&mut own);
    recipes
}
