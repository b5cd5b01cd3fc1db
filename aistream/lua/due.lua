-- The sessions whose deadline has passed, with the state that says what somebody must do about them.
-- KEYS  1 deadlines zset, 2 tick hash
-- ARGV  1 most to look at, 2 lease in ms, 3 prefix of session keys (same slot), 4 most callbacks to give, 5 a random word,
--       6 '1' if the asking worker has lost a connection since it last asked, 7 ms in which all workers notice such a loss
-- gives {birth, number of this look, {id, state, id, state, …}}
-- Atomic: the tick tells whether anybody has been looking. After a silence of over two seconds (Redis was away, or every
-- worker), or a lost connection (behind it may be another Redis now, where leases stand as they were), no running session is
-- given for one lease, since healthy owners must be able to renew first; and no callback until all had the time to say what
-- they have settled. Birth and number tell a worker that the store has been emptied, or has gone back to an earlier state.
local now = now_ms()
local tick = redis.call('HMGET', KEYS[2], 'at', 'calm_until', 'birth', 'unsure_at')
local calm_until, unsure_at = tonumber(tick[2]) or 0, tonumber(tick[4]) or now
local unsure = not tick[3] or ARGV[6] == '1'
if unsure then
  unsure_at = now
end
if unsure or now - (tonumber(tick[1]) or 0) > 2000 then
  calm_until = now + ARGV[2]
end
redis.call('HSET', KEYS[2], 'at', now, 'calm_until', calm_until, 'unsure_at', unsure_at, 'birth', tick[3] or ARGV[5])
local number = redis.call('HINCRBY', KEYS[2], 'looks', 1)
redis.call('EXPIRE', KEYS[2], 86400)
local due = {}
local callbacks = now - unsure_at < tonumber(ARGV[7]) and tick[3] and 0 or tonumber(ARGV[4])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[1])) do
  local state = redis.call('HGET', ARGV[3] .. id, 'state')
  if not state then
    redis.call('ZREM', KEYS[1], id)
  elseif ENDED[state] and callbacks > 0 or state == 'pending' or state == 'running' and now >= calm_until then
    due[#due + 1] = id
    due[#due + 1] = state
    if ENDED[state] then
      callbacks = callbacks - 1
    end
  end
end
return { tick[3] or ARGV[5], number, due }
