//! What is taken of a token's room: objects, sessions and memory, as far as the token tells (PKCS #11 v3.1, CK_TOKEN_INFO).

use cryptoki::object::Attribute;
use cryptoki::slot::{Limit, TokenInfo};
use pintle_plugins_api::Resource;

use crate::fault::Fault;
use crate::keys;
use crate::objects::label;
use crate::session::LoggedInSession;

/// The objects of this agent's keys, and what the token says of itself.
pub(crate) fn usage(session: &mut LoggedInSession) -> Result<Vec<Resource>, Fault> {
    let mut objects = 0;
    for id in keys::list(session)? {
        let own = [Attribute::Token(true), Attribute::Id(id.as_bytes().to_vec()), Attribute::Label(label(&id))];
        objects += session.raw().find_objects(&own)?.len() as u64;
    }
    let mut resources = vec![Resource::new("objects", objects, None)];
    if let Some(info) = session.token_info()? {
        resources.extend(sessions(&info));
        let public = ("bytes of public memory", info.total_public_memory(), info.free_public_memory());
        let private = ("bytes of private memory", info.total_private_memory(), info.free_private_memory());
        resources.extend([public, private].into_iter().filter_map(|(name, total, free)| {
            let (total, free) = (total? as u64, free? as u64);
            Some(Resource::new(name, total.saturating_sub(free), Some(total)))
        }));
    }
    Ok(resources)
}

/// The sessions that this process has open, and how many it may have; those that write, only where they are limited.
fn sessions(info: &TokenInfo) -> impl Iterator<Item = Resource> {
    // SoftHSM and kryoptic do not count them. One is open, and it writes.
    let resource = |name, open: Option<u64>, most| match most {
        Limit::Max(most) => Resource::new(name, open.unwrap_or(0).max(1), Some(most)),
        Limit::Infinite | Limit::Unavailable => Resource::new(name, open.unwrap_or(0).max(1), None),
    };
    let all = resource("sessions", info.session_count(), info.max_session_count());
    let writing = resource("read/write sessions", info.rw_session_count(), info.max_rw_session_count());
    std::iter::once(all).chain(writing.limit.is_some().then_some(writing))
}
