// @ts-check
// TensorBoard around us: tells when its data were reloaded. Outside of it, nothing ever comes.

export function onReload(callback) {
  if (window.parent === window) return;
  const { port1, port2 } = new MessageChannel();
  port1.addEventListener('message', ({ data }) => {
    const message = JSON.parse(data);
    if (message.isReply) return;
    // TensorBoard waits for an answer to all that it sends.
    port1.postMessage(JSON.stringify({ type: message.type, id: message.id, payload: null, error: null, isReply: true }));
    if (message.type === 'experimental.DataReloaded') callback();
  });
  port1.start();
  window.parent.postMessage('experimental.bootstrap', window.location.origin, [port2]);
}
