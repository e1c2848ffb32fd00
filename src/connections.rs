//! Who is let in to a server of this program's: so many at a time, whoever they are.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// How long nobody is let in after an error of the host's.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves each connection on a task of its own until the process ends: at most `most` at a time; more are
/// closed at once.
pub(crate) async fn accept<Serving>(
    listener: TcpListener,
    most: usize,
    serve: impl Fn(TcpStream) -> Serving,
) where
    Serving: Future<Output = ()> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(most));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let serving = serve(stream);
        tokio::spawn(async move {
            serving.await;
            drop(place);
        });
    }
}
