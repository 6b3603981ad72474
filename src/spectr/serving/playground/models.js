// Which of the server's models is the routed one, which are experts alone, which is the base model.

/**
 * @param models {id, routers, outlierScore} as /v1/models lists them: "served", "served/expert" ..., and the base model by its
 *   own name.
 * @returns {{routed: string?, routers: string[], experts: {id, name, outlierScore}[], others: string[]}} others begins with the
 *   base model.
 */
export function sorted(models) {
  const ids = models.map(({ id }) => id);
  const counts = ids.map(id => [id, ids.filter(other => other.startsWith(`${id}/`)).length]);
  const [routed, count] = counts.reduce((best, next) => (next[1] > best[1] ? next : best), [null, 0]);
  if (!count) return { routed: null, routers: [], experts: [], others: ids };
  const alone = id => id.startsWith(`${routed}/`);
  return {
    routed,
    routers: models[ids.indexOf(routed)].routers,
    experts: models
      .filter(({ id }) => alone(id))
      .map(({ id, outlierScore }) => ({ id, name: id.slice(routed.length + 1), outlierScore })),
    others: ids.filter(id => id !== routed && !alone(id)),
  };
}
