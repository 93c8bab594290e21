//! The test bed of pintle: a real control plane, a real kubelet, and the agent under test, as values that clean up after
//! themselves.
//!
//! ```no_run
//! use pintle_test_support::{BootstrapCredential, ControlPlane, Options};
//!
//! let control_plane = ControlPlane::start(Options { cluster_signing_duration: "30s".into(), ..Options::default() });
//! let kubeconfig = control_plane.bootstrap_kubeconfig(BootstrapCredential::SecretToken);
//! println!("{}", control_plane.kubectl(&["get", "nodes"]));
//! # drop(kubeconfig);
//! ```
//!
//! # Guarantees
//! - Nothing outlives the test: each process gets SIGKILL from the kernel when the test process ends, however it ends,
//!   and each scratch directory is removed by then or shortly after.
//! - Test processes running side by side do not meet: every port and directory is reserved first.
//!
//! # Errors
//! Everything here panics with one line that says what it waited for and the end of the log concerned: a test bed that
//! does not work is a failed test. `./tests/run` sets the environment variable `PINTLE_TEST_CLUSTER`, which names the
//! multi-call binary built from `tests/cluster`, and `PINTLE_TEST_CLUSTER_1_21` for that of an old release.

mod agent;
mod audit;
mod authority;
mod bootstrap;
mod clock;
mod condition;
mod control_plane;
mod faulty_module;
mod forward;
mod kubeconfig;
mod kubelet;
mod load;
mod node;
mod ports;
mod private_key_search;
mod process;
mod programs;
mod request;
mod scratch;
mod swtpm;
mod token;

pub use agent::{Agent, AgentCommand};
pub use audit::AuditEvent;
pub use authority::{Authority, CertificatePair};
pub use bootstrap::BootstrapCredential;
pub use clock::MovableClock;
pub use condition::{eventually, holds_within};
pub use control_plane::{ControlPlane, Identity, Options, Release, StaticToken, cluster_binary, kubectl};
pub use faulty_module::faulty_module;
pub use forward::forward;
pub use kubelet::{Kubelet, KubeletOptions};
pub use load::{Load, LoadCount, LoadReport};
pub use node::{Answer, Node, Pair, serial_text};
pub use ports::ReservedPorts;
pub use private_key_search::{Finding, private_key_structures, private_keys_in_files, private_keys_in_memory};
pub use process::{ProcessCommand, Service, TestProcess};
pub use request::SubmittedRequest;
pub use scratch::ScratchDirectory;
pub use swtpm::{ResourceManager, Swtpm};
pub use token::{Token, TokenKey, TokenModule};
